"""Measure the host memory of two processes that divide a model, from loading it to their first step.

One process imports everything; the two of every case are forked from it, train one step of `glmtune train`
with gloo, and report the peak of their resident memory (`ru_maxrss`) above what was held at the fork: when
the base is read, when training is ready to begin, and after the step. Each case runs twice: every process
reads the whole base before it is divided (`whole`), or its part of every tensor (`parts`, what `glmtune
train` does).

    python benchmarks/divided_load_memory.py --work /tmp/divided

The checkpoint (random weights, float32) is made on the way; `--only PATTERN` runs some of the cases.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import glmtune

SHAPE = "--layers 14 --hidden 1280 --ffn 3424 --heads 20 --kv-heads 2 --head-dim 64 --vocab 32000"
CASES = {
    "zero3 lora": ["+recipe=lora", "deepspeed=zero3"],
    "zero3 full": ["+recipe=full", "deepspeed=zero3"],
    "zero3 prefix": ["+recipe=ptuning", "deepspeed=zero3", "prefix.pre_seq_len=16"],
    "fsdp lora": ["+recipe=lora", "distributed=fsdp"],
    "fsdp full": ["+recipe=full", "distributed=fsdp"],
}
WAYS = ("whole", "parts")
COUNT = 2


def make_files(work: Path) -> tuple[Path, Path]:
    """Write checkpoint and rows, once."""
    folder, rows = work / "base", work / "rows.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").is_file():
        script = Path(__file__).with_name("make_checkpoint.py")
        options = [*SHAPE.split(), "--family", "chatglm2", "--dtype", "float32", "--format", "safetensors"]
        options += ["--shard-bytes", "500000000"]
        subprocess.run([sys.executable, str(script), "--out", str(folder), *options], check=True)
        assets = Path(glmtune.__file__).parent / "assets" / "glm-tiny"
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(assets / name, folder / name)
    row = json.dumps({"prompt": "12+34=", "response": "46"})
    rows.write_text(f"{row}\n" * 8, encoding="utf-8")
    return folder, rows


def resident_bytes() -> int:
    """Return the memory this process holds now."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


def train(case: str, way: str, rank: int, port: int, work: Path) -> None:
    """Be one process: train a step, write the figures, end."""
    from transformers import TrainerCallback

    from glmtune.training import session, trainer
    from glmtune.training.config import RunConfig
    from recipes.train import COMMAND, run
    from recipes.words.compose import load_settings

    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": COUNT, "LOCAL_WORLD_SIZE": COUNT}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before, figures = resident_bytes(), {}

    class Meter(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            figures["ready"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            figures["ready_holds"] = resident_bytes() - before

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            figures["step"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            (work / f"figures-{rank}.json").write_text(json.dumps(figures))
            os._exit(0)

    make_optimizer = trainer.GlmTrainer.create_optimizer

    def create_optimizer(self: Any, *args: Any) -> Any:  # before DeepSpeed's engine divides anything
        figures["read"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        return make_optimizer(self, *args)

    trainer.GlmTrainer.create_optimizer = create_optimizer  # type: ignore[method-assign]
    if way == "whole":
        RunConfig.loads_sharded = property(lambda self: False)  # type: ignore[assignment,method-assign]
    session.StopOnSignal.on_train_begin = Meter.on_train_begin  # type: ignore[method-assign]
    session.StopOnSignal.on_step_end = Meter.on_step_end  # type: ignore[method-assign]
    folder, rows = work / "base", work / "rows.jsonl"
    words = [f"model={folder}", "model.device=cpu", "data=files", f"data.train_file={rows}"]
    words += ["trainer.max_steps=1", "trainer.gradient_accumulation_steps=1", "trainer.report_to=[]"]
    words += [f"output_dir={work / 'run'}", "resume=never", "trainer.num_threads=1"]
    run(load_settings(COMMAND, [*CASES[case], *words]))


def measure(case: str, way: str, work: Path) -> list[dict[str, int]]:
    """Run a case in forked processes and return the figures of each, bytes."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    pids = []
    for rank in range(COUNT):
        (work / f"figures-{rank}.json").unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            try:
                train(case, way, rank, port, work)
            finally:
                os._exit(1)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    shutil.rmtree(work / "run", ignore_errors=True)
    return [json.loads((work / f"figures-{rank}.json").read_text()) for rank in range(COUNT)]


def import_everything() -> None:
    """Load what the processes will use, so that it is not counted."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in ("deepspeed", "peft", "glmtune.training.session", "glmtune.training.trainer"):
        importlib.import_module(name)


def main() -> None:
    """Print one line of the table per case and way, MiB of process 0 and 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoint, rows and runs")
    parser.add_argument("--only", default=".", help="regular expression on the names of cases")
    options = parser.parse_args()
    folder, _ = make_files(options.work)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    import_everything()
    sys.stdout.write(f"weights: {size / 2**20:,.0f} MiB\n\n")
    sys.stdout.write(
        "| run | base | peak of reading | peak until ready | held then | peak until after a step |\n"
    )
    sys.stdout.write("|---|---|---|---|---|---|\n")
    for case in (name for name in CASES if re.search(options.only, name)):
        for way in WAYS:
            found = measure(case, way, options.work)
            cells = [
                " / ".join(f"{figures[name] / 2**20:,.0f}" for figures in found)
                for name in ("read", "ready", "ready_holds", "step")
            ]
            sys.stdout.write(f"| {case} | {way} | {' | '.join(cells)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
