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

Arms take turns on the same model in one process, so that other work on the machine falls on all alike.
llama.cpp (see `quantized_inference.py`) is measured after every round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quantized_inference import GLMTUNE, measure_llama, prepare, random_model
from torch import Tensor

from glmtune.inference.engine.batching import continuous_batching
from glmtune.inference.engine.engine import Engine
from glmtune.inference.engine.sampling.choose import ChosenToken, TokenChooser
from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from glmtune.inference.settings import EngineSettings
from glmtune.loading import load_model, load_tokenizer
from glmtune.quantization.kernels.dispatch import prepare_for_inference

ROOT = Path(__file__).resolve().parents[1]
Clock = Callable[[], float]
NUM_SHOTS = 3
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Tokens of a pass whose time is measured."""


@dataclass(frozen=True)
class Text:
    """A prompt and how its answer goes."""

    kind: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class GivenAnswer(TokenChooser):
    """Chooses as always, then takes the next token of a given answer instead."""

    answer: Sequence[int] = ()

    def add(self, key: Hashable, *arguments: Any, **options: Any) -> None:
        """Begin the answer anew."""
        super().add(key, *arguments, **options)
        self._place = 0

    def choose(self, logits_BV: Tensor, keys: Sequence[Hashable | None]) -> list[ChosenToken | None]:
        """Return the token that is given; there is one row."""
        super().choose(logits_BV, keys)
        token = type(self).answer[min(self._place, len(type(self).answer) - 1)]
        self._place += 1
        return [ChosenToken(token)]


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


def decode_seconds(
    engine: Engine, prompt: Sequence[int], sampling: Sampling, clock: Clock
) -> tuple[float, Any]:
    """Return the time from the first token of an answer to its end, and the answer."""
    generation = engine.submit(Request(prompt_ids=tuple(prompt), sampling=sampling))
    while not engine.stats().new_tokens:
        engine.step()
    start = clock()
    while engine.step():
        pass
    return clock() - start, generation.result()


def engine_of(model: Any, lookup: int) -> Engine:
    """Return an engine that answers one request after another and keeps nothing."""
    return Engine(model, EngineSettings(reuse_caches=False, prompt_lookup_tokens=lookup))


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


def measure_given(model: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every text without and with drafts, by turns."""
    continuous_batching.TokenChooser = GivenAnswer  # pyright: ignore[reportPrivateImportUsage]
    rows: list[dict[str, Any]] = []
    for text in texts(arguments.texts):
        GivenAnswer.answer = text.answer
        sampling = Sampling(max_new_tokens=min(len(text.answer), arguments.new))
        for lookup in (0, arguments.lookup):
            engine = engine_of(model, lookup)
            seconds, made = decode_seconds(engine, text.prompt, sampling, arguments.clock)
            stats = engine.stats()
            rows.append(
                {
                    "kind": text.kind,
                    "lookup": lookup,
                    "rate": (len(made.token_ids) - 1) / seconds,
                    "draft": stats.num_draft_tokens,
                    "accepted": stats.num_accepted_tokens,
                    "new": len(made.token_ids),
                }
            )
    return rows


def medians(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return by kind of text: tokens/s without and with drafts, their ratio, and what came of drafts."""
    found: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        off = [row for row in rows if row["kind"] == kind and not row["lookup"]]
        on = [row for row in rows if row["kind"] == kind and row["lookup"]]
        ratios = [b["rate"] / a["rate"] for a, b in zip(off, on, strict=True)]
        found[kind] = {
            "rate": statistics.median(row["rate"] for row in off),
            "rate_lookup": statistics.median(row["rate"] for row in on),
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "right": sum(row["accepted"] for row in on) / max(1, sum(row["draft"] for row in on)),
            "of_new": sum(row["accepted"] for row in on) / sum(row["new"] for row in on),
        }
    return found


def measure_tiny(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Let glm-tiny write its own answers, without and with drafts by turns; they must be the same."""
    rows: list[dict[str, Any]] = []
    for quantization in (None, "int8", "int4"):
        model = load_model("glm-tiny", quantization=quantization, dtype=arguments.dtype, device="cpu")
        prepare_for_inference(model)
        equal, asked = 0, list(texts(arguments.texts))
        for text in asked:
            answers = []
            for lookup in (0, arguments.lookup):
                engine = engine_of(model, lookup)
                sampling = Sampling(max_new_tokens=arguments.new, ignore_eos=True)
                seconds, made = decode_seconds(engine, text.prompt, sampling, arguments.clock)
                stats = engine.stats()
                answers.append(made.token_ids)
                rows.append(
                    {
                        "kind": f"{quantization} {text.kind}",
                        "lookup": lookup,
                        "rate": (len(made.token_ids) - 1) / seconds,
                        "draft": stats.num_draft_tokens,
                        "accepted": stats.num_accepted_tokens,
                        "new": len(made.token_ids),
                    }
                )
            equal += answers[0] == answers[1]
        say({"quantization": quantization, "dtype": arguments.dtype, "equal": f"{equal} of {len(asked)}"})
    return rows


def say(values: dict[str, Any]) -> None:
    """Print a line of JSON."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("layers", 28), ("hidden", 4096), ("ffn", 13696), ("vocab", 65024), ("heads", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("threads", 2), ("rounds", 3), ("texts", 4), ("new", 64), ("lookup", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of llama.cpp's prompt")
    parser.add_argument("--seconds", type=float, default=4, help="of llama.cpp's decoding, at most")
    parser.add_argument(
        "--configurations", nargs="+", choices=list(GLMTUNE), default=["int4", "int4 e8", "int4 a8 e8"]
    )
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
    if arguments.tiny:
        results = [{"tiny": medians(measure_tiny(arguments))}]
        say(results[-1])
    models: dict[str, Any] = {}
    for name in () if arguments.tiny else arguments.configurations:
        method, how = GLMTUNE[name]
        models[name] = random_model(arguments, method)
        prepare(models[name], how)
    for number in range(0 if arguments.tiny else arguments.rounds):
        for name, model in models.items():
            costs = {width: pass_seconds(model, width, 5, arguments.clock) for width in WIDTHS}
            relative = {width: round(cost / costs[1], 3) for width, cost in costs.items()}
            given = medians(measure_given(model, arguments))
            results.append({"round": number, "configuration": name, "pass": relative, **given})
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
