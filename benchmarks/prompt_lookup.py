"""Prompt lookup: what a pass of several tokens costs, and what that brings on three kinds of text.

python benchmarks/prompt_lookup.py --out results.json                                # 28 layers, minutes
python benchmarks/prompt_lookup.py --layers 6 --llama-python /tmp/llama-venv/bin/python
python benchmarks/prompt_lookup.py --tiny                                            # glm-tiny writes itself

The model has the shape of ChatGLM2-6B and random codes, made in memory, and random weights write nothing
that looks like text. So its answers are *given*: every pass is computed in full, head and choice too, and
then the token of a text is taken instead of the chosen one. What is drafted and what of it is right is then
what that text makes it: ads after their attributes (``data/ads``), worked problems behind three others
(``data/gsm8k_sample``), and prose that repeats nothing (a page of ``docs``). They are cut into tokens by
glm-tiny's small vocabulary, nearly character by character, so runs are found more often than with 65,024
words, and say less.

`Engine.complete` answers one prompt after the other, as for `predict` and `eval`, which look in the answers
before, too. Without and with drafts it takes turns on the same model in one process, so that other work on
the machine falls on all alike. llama.cpp (see `quantized_inference.py`) is measured after every round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quantized_inference import GLMTUNE, measure_llama, prepare, shaped_model
from torch import Tensor

from glmtune.inference.engine.batching import continuous_batching
from glmtune.inference.engine.engine import Engine
from glmtune.inference.engine.many_prompts import GeneratedIds
from glmtune.inference.engine.sampling.choose import ChosenToken, TokenChooser
from glmtune.inference.requests.sampling import Sampling
from glmtune.inference.settings import EngineSettings
from glmtune.loading import load_model, load_tokenizer
from glmtune.quantization.kernels.dispatch import prepare_for_inference

ROOT = Path(__file__).resolve().parents[1]
Clock = Callable[[], float]
NUM_SHOTS = 3
KINDS = ("ads", "few-shot", "prose")
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Tokens of a pass whose time is measured."""


@dataclass(frozen=True)
class Text:
    """A prompt and how its answer goes."""

    kind: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class GivenAnswers(TokenChooser):
    """Chooses as always, then takes the next token of the answer that is given to a prompt instead."""

    answers: Mapping[tuple[int, ...], Sequence[int]] = {}

    def add(self, key: Hashable, *arguments: Any, **options: Any) -> None:
        """Begin an answer."""
        super().add(key, *arguments, **options)
        self._left = iter(type(self).answers.get(tuple(arguments[1]), ()))

    def choose(self, logits_BV: Tensor, keys: Sequence[Hashable | None]) -> list[ChosenToken | None]:
        """Return the token that is given; there is one row."""
        [chosen] = super().choose(logits_BV, keys)
        given = next(self._left, None)
        return [chosen if given is None else ChosenToken(given)]


def texts(count: int) -> Iterator[Text]:
    """Yield some texts of each kind."""
    encode = load_tokenizer("glm-tiny").encode

    def text(kind: str, prompt: str, answer: str) -> Text:
        return Text(kind, tuple(encode(prompt)), tuple(encode(answer, add_special_tokens=False)))

    ads = [json.loads(line) for line in (ROOT / "data/ads/dev.jsonl").read_text("utf-8").splitlines()]
    for row in ads[:count]:
        yield text("ads", row["content"], row["summary"])
    folder = ROOT / "data/gsm8k_sample"
    shots = json.loads((folder / "cot_prompt_8shot.json").read_text("utf-8"))
    before = "\n\n".join(
        f"Question: {each['question']}\nAnswer: {each['target']}" for each in shots[:NUM_SHOTS]
    )
    problems = [json.loads(line) for line in (folder / "test.jsonl").read_text("utf-8").splitlines()]
    for row in problems[:count]:
        worked = row["answer"].replace("\n#### ", ". The answer is ")
        yield text("few-shot", f"{before}\n\nQuestion: {row['question']}\nAnswer:", f" {worked}.")
    page = (ROOT / "docs/reliability.md").read_text("utf-8").split("\n\n")
    prose = [each for each in page if len(each) > 300 and not each.startswith(("|", "#", "```"))]
    for first, second in itertools.islice(itertools.pairwise(prose), count):
        yield text("prose", first, second[:400])


def decode(
    model: Any, given: Sequence[Text], lookup: int, arguments: argparse.Namespace
) -> tuple[float, list[GeneratedIds]]:
    """Answer prompts one after the other; return the seconds beside reading them, and the answers."""
    engine = Engine(model, EngineSettings(batch_size=1, share_prefixes=False, prompt_lookup_tokens=lookup))
    seen, read, reading = engine._model, engine._model.read, 0.0

    def timed(*parts: Any, **options: Any) -> Any:
        nonlocal reading
        start = arguments.clock()
        found = read(*parts, **options)
        reading += arguments.clock() - start
        return found

    seen.read = timed
    samplings = [
        Sampling(max_new_tokens=min(len(text.answer), arguments.new), ignore_eos=True) for text in given
    ]
    start = arguments.clock()
    made = list(engine.complete([text.prompt for text in given], samplings, stop_ids=()))
    return arguments.clock() - start - reading, sorted(made, key=lambda each: each.index)


def measured(
    model: Any, kinds: Mapping[str, Sequence[Text]], arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Measure every kind of text without and with drafts, by turns."""
    found: dict[str, dict[str, Any]] = {}
    for kind, given in kinds.items():
        rates: list[float] = []
        answers: list[list[GeneratedIds]] = []
        for lookup in (0, arguments.lookup):
            seconds, made = decode(model, given, lookup, arguments)
            rates.append(sum(each.num_new_tokens - 1 for each in made) / seconds)
            answers.append(made)
        draft = sum(each.num_draft_tokens for each in answers[1])
        accepted = sum(each.num_accepted_tokens for each in answers[1])
        equal = sum(a.token_ids == b.token_ids for a, b in zip(*answers, strict=True))
        found[kind] = {
            "rate": round(rates[0], 2),
            "rate_lookup": round(rates[1], 2),
            "ratio": round(rates[1] / rates[0], 3),
            "right": round(accepted / max(1, draft), 3),
            "of_new": round(accepted / sum(each.num_new_tokens for each in answers[1]), 3),
            "equal": f"{equal} of {len(given)}",
        }
    return found


@torch.inference_mode()
def pass_seconds(model: Any, width: int, steps: int, clock: Clock) -> float:
    """Return the median time of a pass of so many tokens behind 64 others, head included."""
    ids = torch.randint(5, model.config.vocab_size, (1, 64))
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    times: list[float] = []
    for _ in range(steps):
        start = clock()
        model(input_ids=ids[:, :width], cache=output.cache, use_cache=True, logits_to_keep=width)
        times.append(clock() - start)
    return statistics.median(times)


def tiny_models(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return glm-tiny unquantized and quantized."""
    models: dict[str, Any] = {}
    for quantization in (None, "int8", "int4"):
        model = load_model("glm-tiny", quantization=quantization, dtype=arguments.dtype, device="cpu")
        prepare_for_inference(model)
        models[f"glm-tiny {quantization or arguments.dtype}"] = model
    return models


def random_models(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return models of random weights at the shape of 6B."""
    models: dict[str, Any] = {}
    for name in arguments.configurations:
        method, how = GLMTUNE[name]
        models[name] = shaped_model(arguments, method)
        prepare(models[name], how)
    return models


def say(values: dict[str, Any]) -> None:
    """Print a line of JSON."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("layers", 28), ("hidden", 4096), ("ffn", 13696), ("vocab", 65024), ("heads", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("threads", 2), ("rounds", 3), ("texts", 6), ("new", 64), ("lookup", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of llama.cpp's prompt")
    parser.add_argument("--seconds", type=float, default=4, help="of llama.cpp's decoding, at most")
    parser.add_argument(
        "--configurations", nargs="+", choices=list(GLMTUNE), default=["int4", "int4 e8", "int4 a8 e8"]
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--tiny", action="store_true", help="glm-tiny, with answers of its own")
    parser.add_argument("--dtype", default="bfloat16", help="with --tiny")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--gguf", default="/tmp", help="folder for llama.cpp's file")
    parser.add_argument("--out", type=Path, help="JSON file of all measurements")
    parser.add_argument("--cpu-time", action="store_true", help="of this process, with one thread")
    arguments = parser.parse_args()
    if arguments.cpu_time and arguments.threads != 1:
        parser.error("--cpu-time adds up the time of all threads: give --threads 1")
    arguments.clock = time.process_time if arguments.cpu_time else time.perf_counter
    return arguments


def main() -> int:
    """Measure, print a line each, and write all to a file."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    models = tiny_models(arguments) if arguments.tiny else random_models(arguments)
    kinds: dict[str, list[Text]] = {}
    for text in texts(arguments.texts):
        if text.kind not in arguments.kinds:
            continue
        kinds.setdefault(text.kind, []).append(text)
    if not arguments.tiny:
        GivenAnswers.answers = {text.prompt: text.answer for given in kinds.values() for text in given}
        continuous_batching.TokenChooser = GivenAnswers  # pyright: ignore[reportPrivateImportUsage]
    for number in range(arguments.rounds):
        for name, model in models.items():
            costs = {width: pass_seconds(model, width, 5, arguments.clock) for width in WIDTHS}
            relative = {width: round(cost / costs[1], 2) for width, cost in costs.items()}
            results.append(
                {"round": number, "name": name, "pass": relative, **measured(model, kinds, arguments)}
            )
            say(results[-1])
        if arguments.llama_python:
            results.append({"round": number, **measure_llama(replace_seconds(arguments), "llama.cpp Q4_0")})
            say(results[-1])
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def replace_seconds(arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments as llama.cpp's script wants them: enough tokens for its time."""
    return argparse.Namespace(**{**vars(arguments), "new": 64})


if __name__ == "__main__":
    sys.exit(main())
