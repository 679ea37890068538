"""Sessions of several processes, run in one go, and what tests ask of them."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import REPO

SECONDS_PER_SESSION = 300


@dataclass
class Story:
    """Sessions that were run.

    Attributes:
        folder: holds their run folders and logs.
        results: exit codes and seconds by session.
    """

    folder: Path
    results: dict[str, Any]

    def codes(self, name: str) -> list[int]:
        return self.results[name]["codes"]

    def said(self, name: str, rank: int) -> str:
        return (self.folder / f"{name}-{rank}.log").read_text(errors="replace")

    def log(self, run: str) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in (self.folder / run / "trainer_log.jsonl").read_text().splitlines()
        ]

    def logged(self, run: str, key: str) -> list[float]:
        return [entry[key] for entry in self.log(run) if "loss" in entry]

    def losses(self, run: str) -> list[float]:
        return self.logged(run, "loss")

    def evaluations(self, run: str) -> list[float]:
        lines = (self.folder / run / "trainer_log.jsonl").read_text().splitlines()
        return [entry["eval_loss"] for entry in map(json.loads, lines) if "eval_loss" in entry]

    def weights(self, run: str) -> dict[str, Any]:
        files = sorted((self.folder / run / "last").glob("*.safetensors"))
        return {name: weight for file in files for name, weight in load_file(file).items()}

    def steps_saved(self, run: str) -> list[str]:
        return sorted(path.name for path in (self.folder / run).glob("checkpoint-*"))


@functools.cache
def _runner() -> subprocess.Popen[str]:
    """The process that runs all plans, so that DeepSpeed and torch are imported once."""
    runner = subprocess.Popen(
        [sys.executable, str(REPO / "tests" / "e2e" / "sessions.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(runner.communicate)  # closes its input, at which it ends
    return runner


def run_sessions(folder: Path, plan: list[dict[str, Any]]) -> Story:
    """Run a plan in processes that are forks of one where everything is imported."""
    (folder / "plan.json").write_text(json.dumps(plan))
    runner = _runner()
    assert runner.stdin is not None
    assert runner.stdout is not None
    runner.stdin.write(f"{folder / 'plan.json'}\n")
    runner.stdin.flush()
    answers, _, _ = select.select([runner.stdout], [], [], SECONDS_PER_SESSION * len(plan))
    if not answers or runner.stdout.readline() != "done\n":
        runner.kill()
        _runner.cache_clear()
        pytest.fail(f"the sessions in {folder} came to no end, or their runner ended")
    return Story(folder, json.loads((folder / "results.json").read_text()))
