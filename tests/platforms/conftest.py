"""Fixtures of the tests on other systems: how a process is started that finds less than this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
WINDOWS_LIKE = Path(__file__).parent / "windows_like"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a program in an empty folder; words in capitals are variables, None takes one away."""

    def started(
        *command: str | Path, path: str = str(REPO), **variables: str | None
    ) -> subprocess.CompletedProcess[str]:
        environment: dict[str, str | None] = {
            **os.environ,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "GLMTUNE_CACHE": str(tmp_path / "cache"),
            **variables,
        }
        return subprocess.run(
            [str(word) for word in command],
            cwd=tmp_path,
            env={name: value for name, value in environment.items() if value is not None},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=300,
        )

    return started


@pytest.fixture
def windows_like(run: Run) -> Run:
    """Run Python as poor as on Windows: see `windows_like/sitecustomize.py`."""

    def started(*words: str | Path, **variables: str | None) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(WINDOWS_LIKE), str(REPO)])
        return run(sys.executable, *words, path=path, PYTHONWARNDEFAULTENCODING="1", **variables)

    return started
