"""A warm Python for tests that start commands: give its words where `sys.executable` would stand.

What a test asks of the process itself (signals at its start, imports, memory, its number) is for `sys.executable`.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
BEFORE_TESTS = dict(os.environ)
"""As the test session found it: single tests change it."""


def warm_python(*late: str) -> list[str]:
    """Return the first words of a command line, to which `-m glmtune ...` or `-c CODE ...` is added.

    Args:
        late: variables that may be other ones than those of the warm process: what was imported has not read them.
    """
    if not hasattr(os, "pidfd_open"):  # only Linux has it
        return [sys.executable]
    return [sys.executable, "-I", "-S", str(HERE / "client.py"), str(_place()), ",".join(late)]


@functools.cache
def _place() -> Path:
    """Start the warm process, which ends with this one, and return its socket."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    environment = {**BEFORE_TESTS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    facts = {"environment": environment, "paths": ["", str(REPO), BEFORE_TESTS.get("PYTHONPATH", "")]}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    log = folder / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py"), str(folder / "socket")],
            cwd=REPO,
            env=environment,
            stdin=subprocess.PIPE,  # closed with this process, at which it ends
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n", log.read_text(encoding="utf-8")[-2000:]
    _kept.append(process)
    return folder / "socket"


_kept: list[subprocess.Popen[bytes]] = []


@functools.cache
def warm_folder() -> Path:
    """Return a folder for the front of PATH, whose `glmtune` is a warm one."""
    words = warm_python()
    folder = Path(tempfile.mkdtemp(prefix="warm-bin-")) if len(words) == 1 else _place().parent
    script = folder / "glmtune"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} -m glmtune "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return folder
