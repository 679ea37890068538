"""Peak memory and time of preference tuning, beside supervised tuning and a second model as reference.

One process imports everything and trains a tiny model in every way, so that code and caches are there. Each
arm then trains in a process forked from it: 2 pairs a step, prompt and answers of 128 tokens each.

    sft     supervised tuning on as many rows of the same length (4)
    base    DPO, the reference the same weights with the tuned part passed by (what `glmtune train` does)
    start   DPO, the reference kept from one pass before the first step
    two     DPO, the reference a second model in memory (what glmtune does not do)

    python benchmarks/preference_memory.py --work /tmp/preference_memory

Peak is that of resident memory (`ru_maxrss`) above what was held at the fork; time is the processor time of
a step, the first one left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from forked import in_child
from plan_accuracy import resident_bytes

import glmtune

PAIRS, SIDE, STEPS = 2, 128, 4
"""Pairs in a step, tokens of a prompt and of an answer, steps."""
ARMS = ("sft", "base", "start", "two")
SHAPES = {
    "2m": {"layers": 2, "hidden": 256, "ffn": 688, "heads": 4},
    "25m": {"layers": 8, "hidden": 512, "ffn": 1376, "heads": 8},
    "83m": {"layers": 12, "hidden": 768, "ffn": 2048, "heads": 12},
}
"""Name -> options of `benchmarks/make_checkpoint.py`; the vocabulary is that of glm-tiny's tokenizer."""
RECIPES = {"prefix": "+recipe=ptuning_official", "lora": "+recipe=lora", "full": "+recipe=full"}


def make_model(work: Path, shape: str) -> Path:
    """Write a checkpoint of random weights, once, with glm-tiny's tokenizer."""
    folder = work / f"chatglm2-{shape}"
    if (folder / "config.json").is_file():
        return folder
    assets = Path(glmtune.__file__).parent / "assets" / "glm-tiny"
    sizes = {**SHAPES[shape], "head-dim": 64, "vocab": 4864, "kv-heads": 2}
    options = [item for key, value in sizes.items() for item in (f"--{key}", str(value))]
    options += ["--out", str(folder), "--dtype", "float32", "--format", "safetensors"]
    script = Path(__file__).with_name("make_checkpoint.py")
    subprocess.run([sys.executable, str(script), *options], check=True)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(assets / name, folder / name)
    return folder


def write_rows(work: Path) -> None:
    """Write pairs, and the same answers one by one, long enough to be cut to the longest length."""
    sums = [f"{a}+{b}={a + b} " for a in range(10, 60) for b in range(10, 60)]
    pairs, answers = [], []
    for number in range(32):
        text = "".join(sums[number:])
        better, worse = text[5000:9000], text[9000:13000]
        pairs.append({"prompt": text[:4000], "chosen": better, "rejected": worse})
        answers += [{"prompt": text[:4000], "response": each} for each in (better, worse)]
    for name, rows in (("pairs", pairs), ("answers", answers)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (work / f"{name}.jsonl").write_text(text, encoding="utf-8")


def overrides(tune: str, arm: str, model: Path, work: Path) -> list[str]:
    """Return the words of `glmtune train` for an arm."""
    rows = "answers" if arm == "sft" else "pairs"
    kind = [] if arm == "sft" else ["preference=dpo", "data.layout=preference"]
    kind += ["preference.reference=start"] if arm == "start" else []
    return [
        RECIPES[tune],
        *kind,
        f"model={model}",
        "model.device=cpu",
        "data=files",
        f"data.train_file={work / rows}.jsonl",
        f"data.max_source_length={SIDE}",
        f"data.max_target_length={SIDE}",
        f"trainer.per_device_train_batch_size={2 * PAIRS if arm == 'sft' else PAIRS}",
        "trainer.gradient_accumulation_steps=1",
        f"trainer.max_steps={STEPS}",
        "trainer.save_steps=1000",
        "trainer.logging_steps=1",
        "trainer.learning_rate=1e-4",
        "trainer.report_to=[]",
        "trainer.num_threads=1",
        "retention=null",
        f"output_dir={work / 'run'}",
        "resume=never",
    ]


@contextmanager
def measured_against(arm: str, model: Path) -> Iterator[None]:
    """Give a run a second model as its reference, where that is the arm."""
    from glmtune.loading import load_base
    from glmtune.preference.log_probs import AnswerLogProbs, answer_log_probs
    from glmtune.training.preference.trainer import PreferenceTrainer

    original = PreferenceTrainer._reference
    if arm == "two":
        second = load_base(str(model), device="cpu").eval().requires_grad_(False)

        def reference(self: PreferenceTrainer, _: Any, inputs: Any) -> AnswerLogProbs:
            with self._frozen(second):
                return answer_log_probs(second, inputs)

        PreferenceTrainer._reference = reference
    try:
        yield
    finally:
        PreferenceTrainer._reference = original


def run_arm(tune: str, arm: str, model: Path, work: Path) -> dict[str, Any]:
    """Train, and return the peak above the start (bytes) and the processor seconds of a step."""
    from glmtune.training.trainer import GlmTrainer
    from recipes.train import COMMAND, run
    from recipes.words.compose import load_settings

    marks: list[float] = []
    original = GlmTrainer.get_batch_samples

    def marked(self: GlmTrainer, *args: Any, **kwargs: Any) -> Any:
        marks.append(time.process_time())
        return original(self, *args, **kwargs)

    GlmTrainer.get_batch_samples = marked
    before = resident_bytes()
    words = overrides(tune, arm, model, work)
    with measured_against(arm, model), without_keeping(arm):
        run(load_settings(COMMAND, words))
    GlmTrainer.get_batch_samples = original
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    steps = [later - earlier for earlier, later in pairwise(marks[1:])]
    return {"tune": tune, "arm": arm, "peak": peak - before, "seconds": statistics.median(steps)}


@contextmanager
def without_keeping(arm: str) -> Iterator[None]:
    """Let no reference be kept where a second model is asked."""
    from glmtune.training import session

    original = session.reference_start
    if arm == "two":
        session.reference_start = lambda *_: None
    try:
        yield
    finally:
        session.reference_start = original


def main() -> None:
    """Run the arms one after the other, each in a process of its own, and print the table."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, rows and runs")
    parser.add_argument("--shape", default="25m", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tune", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    write_rows(options.work)
    small, model = make_model(options.work, "2m"), make_model(options.work, options.shape)
    for tune in options.tune:
        for arm in ARMS[:3]:
            run_arm(tune, arm, small, options.work)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for tune in options.tune:
            for arm in ARMS:
                if (tune, arm) == ("full", "base"):  # its weights are those being trained
                    continue
                one = in_child(lambda tune=tune, arm=arm: run_arm(tune, arm, model, options.work))
                sys.stderr.write(json.dumps(one) + "\n")
                found.setdefault((tune, arm), []).append(one)
    sys.stdout.write(table(found))


def table(found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """Lay the results out in Markdown: the largest peak in MiB, the median seconds."""
    lines = [
        "| tuned | arm | peak MiB | beside sft | CPU s/step | beside sft |",
        "|---|---|---:|---:|---:|---:|",
    ]
    figures = {
        key: (max(one["peak"] for one in rows) / 2**20, statistics.median(one["seconds"] for one in rows))
        for key, rows in found.items()
    }
    for (tune, arm), (peak, seconds) in figures.items():
        base_peak, base_seconds = figures[tune, "sft"]
        lines.append(
            f"| {tune} | {arm} | {peak:,.0f} | {peak / base_peak:.2f} | {seconds:.2f}"
            f" | {seconds / base_seconds:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
