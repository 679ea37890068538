"""Measure how long training waits for a checkpoint, written while it waits or beside it.

One process imports everything; every run is forked from it: full tuning of a model of random weights on the
CPU, a checkpoint every second step. Printed are the seconds that training waited for its checkpoints
(the last one, for which the end of a run waits in any case, is left out), the seconds of all steps, and the
peak of resident memory above what was held at the fork.

    python benchmarks/async_save.py --work /tmp/async_save
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from forked import in_child

import glmtune

SHAPE = "--layers 8 --hidden 512 --ffn 1376 --heads 8 --kv-heads 2 --head-dim 64 --vocab 32000"
STEPS = 8


def make_files(work: Path) -> None:
    """Write checkpoint and rows, once."""
    folder = work / "base"
    work.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").is_file():
        script = Path(__file__).with_name("make_checkpoint.py")
        options = [*SHAPE.split(), "--family", "chatglm2", "--dtype", "float32", "--format", "safetensors"]
        subprocess.run([sys.executable, str(script), "--out", str(folder), *options], check=True)
        assets = Path(glmtune.__file__).parent / "assets" / "glm-tiny"
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(assets / name, folder / name)
    text = " ".join(f"{a}+{b}={a + b}" for a in range(10, 30) for b in range(10, 30))
    row = json.dumps({"prompt": text, "response": text})
    (work / "rows.jsonl").write_text(f"{row}\n" * 32, encoding="utf-8")


def resident_bytes() -> int:
    """Return the memory this process holds now."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


def train(beside: bool, work: Path) -> dict[str, float]:
    """Train and return the figures."""
    from glmtune.training.trainer import GlmTrainer
    from recipes.train import COMMAND, run
    from recipes.words.compose import load_settings

    waits: list[float] = []
    save = GlmTrainer._save_checkpoint

    def timed(self: Any, *args: Any) -> None:
        start = time.monotonic()
        save(self, *args)
        if self.state.global_step < STEPS:
            waits.append(time.monotonic() - start)

    GlmTrainer._save_checkpoint = timed  # type: ignore[method-assign]
    before, start = resident_bytes(), time.monotonic()
    words = [
        f"model={work / 'base'}",
        "model.device=cpu",
        "data=files",
        f"data.train_file={work / 'rows.jsonl'}",
    ]
    words += ["data.max_source_length=128", "data.max_target_length=127", "data.on_bad_row=error"]
    words += [f"trainer.max_steps={STEPS}", "trainer.gradient_accumulation_steps=4", "trainer.save_steps=2"]
    words += ["trainer.save_total_limit=1", "trainer.report_to=[]", "trainer.num_threads=1"]
    words += [f"trainer.async_save={str(beside).lower()}", f"output_dir={work / 'run'}", "resume=never"]
    run(load_settings(COMMAND, ["+recipe=full", *words]))
    return {
        "wait": statistics.median(waits),
        "all": time.monotonic() - start,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    }


def measure(beside: bool, work: Path) -> dict[str, float]:
    """Train in a forked process."""
    found = in_child(lambda: train(beside, work))
    shutil.rmtree(work / "run", ignore_errors=True)
    return found


def main() -> None:
    """Train in turn, and print one line of the table per run at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoint, rows and runs")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    make_files(options.work)
    for name in ("peft", "glmtune.training.session", "glmtune.training.trainer"):
        importlib.import_module(name)
    lines = ["| checkpoints | wait for one, s (median) | whole run, s | peak, MiB |", "|---|---|---|---|"]
    for _ in range(options.rounds):
        for beside in (False, True):
            found = measure(beside, options.work)
            way = "beside training" if beside else "training waits"
            cells = (f"{found['wait']:.2f}", f"{found['all']:.1f}", f"{found['peak'] / 2**20:,.0f}")
            lines.append(f"| {way} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
