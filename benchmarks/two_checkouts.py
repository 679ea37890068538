"""Is a change as fast as what was there before? The same commands in two checkouts, taking turns.

A change that moves code must leave speed alone; each job is one command of glmtune on the embedded model, run
as a process of its own in an empty folder. Reported are medians of wall-clock and processor seconds, and the
median of the ratios new/old, pair by pair: pairs are neighbours in time, so a machine that slows down in the
course of the benchmark slows both halves of a pair.

git worktree add /tmp/old COMMIT
python benchmarks/two_checkouts.py /tmp/old . --rounds 5
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

JOBS = {
    "help": "--help",
    "help of train": "train --help",
    "train": "train +recipe=ptuning data=ads trainer.max_steps=60 data.max_eval_samples=40 output_dir=run",
    "full": "train +recipe=full data=ads trainer.max_steps=30 data.max_eval_samples=40 output_dir=run",
    "decode": "predict data=ads data.max_predict_samples=48 generation.max_new_tokens=64 output_dir=out",
    "eval, choices": "eval benchmark=mmlu benchmark.data_dir=sample protocol=few_shot_direct output_dir=out",
    "eval, chains": "eval benchmark=gsm8k benchmark.data_dir=sample benchmark.limit=24 output_dir=out",
}
REPEATS = {"help": 10}
"""Commands too short to be timed once."""


def measure(checkout: Path, words: str, repeats: int, threads: int) -> tuple[float, float]:
    """Run a command in an empty folder; return wall-clock and processor seconds of one run."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-P", "-m", "glmtune", *words.split()]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
        if done.returncode:
            raise SystemExit(f"{checkout}: glmtune {words}\n{done.stderr[-2000:]}")
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall / repeats, used / repeats


def main() -> None:
    """Take turns, then print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="checkout to compare with")
    parser.add_argument("new", type=Path, help="checkout that changed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    options = parser.parse_args()
    places = [options.old.resolve(), options.new.resolve()]
    print("| job | old, s | new, s | wall new/old | processor new/old |\n|---|---|---|---|---|")
    for job in options.jobs:
        found: list[list[tuple[float, float]]] = [[], []]
        for number in range(options.rounds + 1):
            turn = (0, 1) if number % 2 else (1, 0)  # the first of a pair may find colder caches
            pair = {
                side: measure(places[side], JOBS[job], REPEATS.get(job, 1), options.threads) for side in turn
            }
            if number:  # the first round fills the caches of files and compiled kernels
                for side in (0, 1):
                    found[side].append(pair[side])
        wall, used = (
            statistics.median(new[kind] / old[kind] for old, new in zip(*found, strict=True))
            for kind in (0, 1)
        )
        old, new = (statistics.median(seconds for seconds, _ in side) for side in found)
        print(f"| {job} | {old:.3f} | {new:.3f} | {wall:.3f} | {used:.3f} |", flush=True)


if __name__ == "__main__":
    main()
