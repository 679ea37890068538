"""What a million rows cost: memory and seconds of `glmtune data check` and of a training's start.

    python benchmarks/data_of_any_size.py [--rows 1000000] [--folder FOLDER] [--model glm-tiny]

Generates the rows (JSON Lines, some 300 bytes each), then runs each command in a process of its own: on a
data set of 50 rows, which is what a command costs by itself (imports, tokenizer, model), on all of them with
an empty cache, and on all of them again. Measured are seconds, CPU seconds (which other work on the machine
moves less) and the largest sum of the resident memory of the process and all that it started, sampled every
50 ms; what several of them share counts in each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

WORDS = [
    "类型",
    "裙",
    "颜色",
    "白",
    "面料",
    "棉",
    "风格",
    "简约",
    "图案",
    "条纹",
    "版型",
    "宽松",
    "长袖",
    "柔软",
    "显瘦",
]
ANSWER_CHARACTERS = (40, 76)


def write_rows(file: Path, count: int) -> None:
    """Write rows such as ADGEN's; the same for the same count."""
    draw = random.Random(1)
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            words = draw.choices(WORDS, k=60)
            question = f"{number}#" + "*".join(words[:10])
            answer = "".join(words[10:])[: draw.randint(*ANSWER_CHARACTERS)]
            out.write(json.dumps({"content": question, "summary": answer}, ensure_ascii=False) + "\n")


def measured(command: Sequence[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Run a command to its end.

    Returns:
        Seconds, CPU seconds, and the most MiB that it and its children held at a time.
    """
    begun, most = time.monotonic(), 0
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        held = 0
        for each in [process, *_children(process)]:
            try:
                held += each.memory_info().rss
            except psutil.Error:
                continue
        most = max(most, held)
        time.sleep(0.05)
    seconds = time.monotonic() - begun
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr.read().decode()[-3000:]}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, most / 2**20


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def plan_seconds(lengths: np.ndarray) -> dict[str, float]:
    """Return the CPU seconds of planning an epoch of rows of these lengths."""
    from glmtune.data.collate import pack_lengths
    from glmtune.training.row_order import EpochSampler

    found: dict[str, float] = {}
    for name, plan in (
        ("packs of 1024 tokens", lambda: pack_lengths(lengths, 1024)),  # type: ignore[arg-type]
        (
            "order, by length",
            lambda: list(EpochSampler(lengths, batch_size=8, group_by_length=True, seed=1)),  # type: ignore[arg-type]
        ),
        (
            "order, shuffled",
            lambda: list(EpochSampler(lengths, batch_size=8, group_by_length=False, seed=1)),  # type: ignore[arg-type]
        ),
    ):
        begun = time.process_time()
        plan()
        found[name] = time.process_time() - begun
    return found


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--model", default="glm-tiny")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="glmtune-rows-"))
    folder.mkdir(parents=True, exist_ok=True)
    few, many, cache = folder / "few.jsonl", folder / "many.jsonl", folder / "cache"
    write_rows(few, 50)
    if not many.exists():
        write_rows(many, options.rows)
    shutil.rmtree(cache, ignore_errors=True)
    environment = {**os.environ, "GLMTUNE_CACHE": str(folder / "kernels")}
    commands = {
        "data check": ["data", "check"],
        "train, 1 step": [
            "train", "+recipe=ptuning", "trainer.max_steps=1", "retention=null", "prefix.switch=false",
            "resume=never", f"output_dir={folder / 'run'}", "plan.enforce=false",
        ],
    }  # fmt: skip
    print(f"{options.rows:,} rows, {many.stat().st_size / 1e6:.0f} MB")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(time.strftime("%Y-%m-%d\n"))
    print("| command | rows | cache | seconds | CPU seconds | peak MiB |\n|---|---|---|---|---|---|")
    for name, words in commands.items():
        for file, state in ((few, "-"), (many, "empty"), (many, "full"), (few, "-"), (many, "full")):
            if state == "empty":
                shutil.rmtree(cache, ignore_errors=True)
            own = [
                f"model={options.model}",
                "data=files",
                f"data.train_file={file}",
                f"data.cache_dir={cache}",
            ]
            seconds, cpu, mebibytes = measured([sys.executable, "-m", "glmtune", *words, *own], environment)
            rows = f"{options.rows:,}" if file == many else "50"
            print(f"| {name} | {rows} | {state} | {seconds:.1f} | {cpu:.1f} | {mebibytes:.0f} |", flush=True)
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    print(f"\nThe cache takes {size / 1e6:.0f} MB.")
    lengths = np.concatenate([np.load(file) for file in cache.glob("*/lengths.npy")])
    for name, seconds in plan_seconds(lengths).items():
        print(f"Planning {len(lengths):,} rows, {name}: {seconds:.2f} s of one core.")


if __name__ == "__main__":
    main()
