"""Sessions of several processes, run in one go, and what tests ask of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.conftest import REPO

SECONDS_PER_SESSION = 120


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
        return load_file(self.folder / run / "last" / "model.safetensors")

    def steps_saved(self, run: str) -> list[str]:
        return sorted(path.name for path in (self.folder / run).glob("checkpoint-*"))


def run_sessions(folder: Path, plan: list[dict[str, Any]]) -> Story:
    """Run a plan in a process of its own, where DeepSpeed is imported once."""
    (folder / "plan.json").write_text(json.dumps(plan))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, str(REPO / "tests" / "e2e" / "sessions.py"), str(folder / "plan.json")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS_PER_SESSION * len(plan),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Story(folder, json.loads((folder / "results.json").read_text()))
