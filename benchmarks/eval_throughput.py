"""Compare the evaluation engine with lm-evaluation-harness's transformers backend and its own plain path.

All arms ask the same model the same prompts and take turns:

lm-eval    `lm_eval.models.huggingface.HFLM` around the very same model object
glmtune    `GlmBackend` with its defaults
plain      `GlmBackend` without shared prefixes (`engine.share_prefixes=false`)

MMLU: five-shot, log-probabilities of the four letters. BBH: three-shot CoT, greedy. Both: whole subjects, or
with `--mmlu-limit` and `--bbh-limit` their first questions in file order. Beside each part stands what
sharing permits: tokens of all prompts over those that the engine reads, as if the prefill were all.

A random model never ends a completion, so all run to the limit, and refilling slots gains nothing;
`bbh-short` generates little (the prompts decide), and `bbh-ragged` ends completions at a stop string that the
random model happens to write early or late. Choices and texts of the arms are compared.

An end token that decodes to nothing, as ChatGLM2's does, makes the harness believe that every prompt begins
with it and that it is a stop string always there: it leaves out `[gMASK] sop` and stops after one token.
Here it is told better, so that it does the same work.

It is no dependency: `pip install "lm_eval[hf]"` into an environment that also has glmtune.

    python benchmarks/make_checkpoint.py --hidden 512 --layers 8 --heads 8 --head-dim 64 --ffn 1376 \
        --vocab 4992 --seq-length 4096 --dtype float32 --std 0.05 \
        --tokenizer glmtune/assets/glm-tiny/tokenizer.model --out /tmp/chatglm2-27m
    python benchmarks/eval_throughput.py --model /tmp/chatglm2-27m --data-dir FOLDER --parts mmlu bbh
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evaluation.backend import Backend, Limits
from evaluation.sample import Prompt

ARMS = ("lm-eval", "glmtune", "plain")
TIE = 1e-4
"""Log-probabilities closer than this are a tie: float32 rounding decides."""
MMLU_SUBJECTS = ("abstract_algebra", "anatomy", "astronomy", "business_ethics", "college_biology")
BBH_SUBJECTS = ("boolean_expressions", "date_understanding", "navigate")


@dataclass(frozen=True)
class Part:
    """Questions that all arms are asked.

    Attributes:
        name: of the part.
        prompts: what is asked.
        choices: scored where given, otherwise completions are generated.
        limits: of the completions.
    """

    name: str
    prompts: Sequence[Prompt]
    choices: tuple[str, ...] = ()
    limits: Limits | None = None


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of an official-format checkpoint")
    parser.add_argument("--data-dir", required=True, help="folder with the official files of mmlu and bbh")
    parser.add_argument("--mmlu-subjects", nargs="+", default=MMLU_SUBJECTS)
    parser.add_argument("--bbh-subjects", nargs="+", default=BBH_SUBJECTS)
    parser.add_argument("--mmlu-limit", type=int, help="questions per subject; default: all")
    parser.add_argument("--bbh-limit", type=int, help="questions per subject; default: all")
    parser.add_argument("--growth-limit", type=int, default=64, help="questions of the part growth")
    parser.add_argument("--new-tokens", type=int, default=128, help="longest completion of bbh")
    parser.add_argument("--short-tokens", type=int, default=8, help="longest completion of bbh-short")
    parser.add_argument("--ragged-stop", nargs="+", default=["e"], help="stop strings of bbh-ragged")
    parser.add_argument("--harness-batch", type=int, default=8, help="batch size of lm-eval")
    parser.add_argument("--parts", nargs="+", default=["mmlu", "bbh", "bbh-short", "bbh-ragged", "growth"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=3, help="measurements per arm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cpu-time", action="store_true", help="not wall time: where others work on the machine, one thread"
    )
    return parser.parse_args()


def make_parts(options: argparse.Namespace) -> dict[str, Part]:
    """Read the questions and write the prompts by our own protocols for base models."""
    from evaluation.benchmarks.tasks import make_task

    settings = {"data_dir": options.data_dir, "is_chat": False}
    mmlu = make_task(
        "mmlu",
        protocol="few_shot_direct",
        subjects=options.mmlu_subjects,
        limit=options.mmlu_limit,
        **settings,
    )
    bbh = make_task(
        "bbh", protocol="few_shot_cot", subjects=options.bbh_subjects, limit=options.bbh_limit, **settings
    )
    asked = [bbh.prompt(sample) for sample in bbh.samples]
    limits = replace(bbh.limits, max_new_tokens=options.new_tokens)
    parts = [
        Part("mmlu", [mmlu.prompt(sample) for sample in mmlu.samples], choices=mmlu.choices),
        Part("bbh", asked, limits=limits),
        Part("bbh-short", asked, limits=replace(limits, max_new_tokens=options.short_tokens)),
        Part("bbh-ragged", asked, limits=replace(limits, stop=tuple(options.ragged_stop))),
    ]
    return {part.name: part for part in parts}


def ask_backend(backend: Backend, part: Part) -> list[Any]:
    """Return log-probabilities or texts, in the order of the prompts."""
    if part.choices:
        scores = dict(backend.score_choices(part.prompts, part.choices))
        return [scores[place].logprobs for place in range(len(part.prompts))]
    assert part.limits is not None
    made = dict(backend.generate(part.prompts, part.limits))
    return [made[place].text for place in range(len(part.prompts))]


def ask_harness(harness: Any, part: Part) -> list[Any]:
    """Ask lm-eval the same; every choice is a request of its own, as its tasks make them."""
    from lm_eval.api.instance import Instance

    def instance(kind: str, place: int, *arguments: object) -> Any:
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=place)

    texts = [prompt.text for prompt in part.prompts]
    if part.limits is not None:
        settings = {"until": list(part.limits.stop), "max_gen_toks": part.limits.max_new_tokens}
        requests = [
            instance("generate_until", place, text, {**settings, "do_sample": False})
            for place, text in enumerate(texts)
        ]
        return harness.generate_until(requests, disable_tqdm=True)
    requests = [
        instance("loglikelihood", place, text, choice)
        for place, text in enumerate(texts)
        for choice in part.choices
    ]
    scores = [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    width = len(part.choices)
    return [tuple(scores[place : place + width]) for place in range(0, len(scores), width)]


def make_harness(model: Any, tokenizer: Any, batch_size: int, max_length: int) -> Any:
    """Put lm-eval around a model; see the top of this file for what it is told."""
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
            if tokens == self.eot_token_id:
                return "</s>"
            return super().tok_decode(tokens, skip_special_tokens=skip_special_tokens)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
            chosen = True if add_special_tokens is None else add_special_tokens
            return super().tok_encode(string, add_special_tokens=chosen, **others)

    return Harness(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=max_length,
    )


Arms = dict[str, Callable[[Part], list[Any]]]


def make_arms(options: argparse.Namespace) -> tuple[Arms, int, Callable[[Part], str]]:
    """Load the model once and put each arm around it.

    Returns:
        The arms, the model's number of parameters, and what says how much of a part is shared.
    """
    from evaluation.backends.glm import GlmBackend
    from glmtune.inference.settings import EngineSettings
    from glmtune.loading import load_model, load_tokenizer

    model, tokenizer = load_model(options.model, device="cpu"), load_tokenizer(options.model)
    shared = GlmBackend(model, tokenizer, name="random", is_chat=False)
    plain = GlmBackend(
        model, tokenizer, name="random", is_chat=False, settings=EngineSettings(share_prefixes=False)
    )

    def shares(part: Part) -> str:
        from evaluation.backends.prompt_encoder import PromptEncoder
        from glmtune.inference.engine.prompt_groups import group_prompts

        encoder = PromptEncoder(tokenizer)
        prompts = [tuple(encoder.ids(prompt)) for prompt in part.prompts]
        groups = group_prompts(prompts, min_gain=EngineSettings().min_shared_gain)
        asked = sum(map(len, prompts))
        own = sum(len(prompts[place]) - group.num_shared for group in groups for place in group.members)
        read = own + sum(group.num_shared for group in groups)
        return (
            f"{asked:,} tokens of prompts, {read:,} read: sharing permits {asked / read:.2f}x of the prefill"
        )

    arms: Arms = {
        "glmtune": lambda part: ask_backend(shared, part),
        "plain": lambda part: ask_backend(plain, part),
    }
    if "lm-eval" in options.arms:
        harness = make_harness(model, tokenizer, options.harness_batch, shared.max_context_tokens)
        arms["lm-eval"] = lambda part: ask_harness(harness, part)
    return arms, model.num_parameters(), shares


def compare(part: Part, mine: Sequence[Any], other: Sequence[Any]) -> str:
    """Say how far two arms agree."""
    if not part.choices:
        same = sum(a == b for a, b in zip(mine, other, strict=True))
        return f"{same}/{len(mine)} texts identical"
    same = ties = 0
    largest = 0.0
    for a, b in zip(mine, other, strict=True):
        ranked = sorted(a, reverse=True)
        is_tie = ranked[0] - ranked[1] < TIE
        ties += is_tie
        same += a.index(max(a)) == b.index(max(b)) or is_tie
        largest = max(largest, *(abs(x - y) for x, y in zip(a, b, strict=True)))
    return f"{same}/{len(mine)} choices identical ({ties} ties), log-probabilities within {largest:.1e}"


def run_part(options: argparse.Namespace, arms: Arms, part: Part) -> None:
    """Measure all arms in turn and print one row for each."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {arm: [] for arm in options.arms}
    answers: dict[str, list[Any]] = {}
    for number in range(options.rounds):
        for arm in options.arms if number % 2 == 0 else reversed(options.arms):
            began = clock()
            answers[arm] = arms[arm](part)
            seconds[arm].append(clock() - began)
            print(f"  {part.name} round {number + 1} {arm}: {seconds[arm][-1]:.1f} s", flush=True)
    first = seconds[options.arms[0]]
    for arm in options.arms:
        middle = statistics.median(seconds[arm])
        rate = len(part.prompts) / middle
        # Of a round: arms that take turns have the same neighbours.
        ratio = statistics.median(base / own for base, own in zip(first, seconds[arm], strict=True))
        print(
            f"| {part.name} | {arm} | {len(part.prompts)} | {middle:.1f} | {min(seconds[arm]):.1f} to"
            f" {max(seconds[arm]):.1f} | {rate:.2f} | {ratio:.2f} |",
            flush=True,
        )
    for arm in options.arms:
        if arm != "glmtune" and "glmtune" in answers:
            print(f"  glmtune against {arm}: {compare(part, answers['glmtune'], answers[arm])}", flush=True)


def run_growth(options: argparse.Namespace, arms: Arms, mmlu: Part) -> None:
    """Measure how the cost grows with the questions of one subject."""
    subject = list(mmlu.prompts)[: options.growth_limit]
    size = 1
    while size <= len(subject):
        part = replace(mmlu, name=f"growth {size}", prompts=subject[:size])
        row = []
        for arm in options.arms:
            began = time.perf_counter()
            arms[arm](part)
            row.append(f"{time.perf_counter() - began:.2f}")
        print(f"| {size} | {' | '.join(row)} |", flush=True)
        size *= 4


def main() -> None:
    """Run all parts and print Markdown rows."""
    options = parse_arguments()
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    parts = make_parts(options)
    arms, num_parameters, shares = make_arms(options)
    print(json.dumps({"parameters": num_parameters, **vars(options)}, default=str), flush=True)
    print("| part | arm | questions | median s | range s | questions/s | x first arm |\n" + "|---" * 7 + "|")
    for name in options.parts:
        if name == "growth":
            run_growth(options, arms, parts["mmlu"])
        else:
            print(f"  {name}: {shares(parts[name])}", flush=True)
            run_part(options, arms, parts[name])


if __name__ == "__main__":
    main()
