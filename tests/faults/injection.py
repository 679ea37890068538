"""Spoil what a real command does to its files: a full disk, errors of the system, death at the n-th write.

`inject.c` stands between a process and libc, so everything is counted alike, whether Python, torch or safetensors does
it. A campaign first runs a command with `Fault()`, which only counts, and then once for every operation.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

REPO = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("inject.c")
KILLED = -9


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and when; as it is, nothing: operations are only counted.

    Attributes:
        action: "kill" (SIGKILL; a write has then written half), or the number of an error, such as `errno.ENOSPC`.
        at: the number of the operation, from 1; 0 for none.
        ops: kinds that count: open, read, write, sync, rename, remove, mkdir, link, truncate; empty: all but read,
            which is opening for reading.
        pattern: of paths that count, below the folder watched; `*` matches slashes too.
        lasting: all later operations fail as well, as on a disk that stays full.
        rank: the only one of several processes in which it happens.
    """

    action: str | int = ""
    at: int = 0
    ops: tuple[str, ...] = ()
    pattern: str = ""
    lasting: bool = False
    rank: int | None = None

    def environment(self, root: Path, log: Path | None = None) -> dict[str, str]:
        """Return the variables that tell it to a process whose files below ``root`` are watched."""
        values = {
            "FAULT_ROOT": str(root.resolve()),
            "FAULT_ACTION": str(self.action),
            "FAULT_AT": str(self.at),
            "FAULT_OPS": ",".join(self.ops),
            "FAULT_GLOB": self.pattern,
            "FAULT_LOG": str(log or ""),
            "FAULT_RANK": "" if self.rank is None else str(self.rank),
        }
        return values | ({"FAULT_LASTING": "1"} if self.lasting else {})


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code; -9 where it was killed.
        output: what it printed and said.
        seconds: how long it ran.
        operations: what it did to files, as lines ``number kind path``; empty unless faults were asked for.
    """

    code: int
    output: str
    seconds: float
    operations: tuple[str, ...] = ()

    @property
    def is_killed(self) -> bool:
        """Whether a SIGKILL ended it."""
        return self.code == KILLED

    @property
    def is_raw(self) -> bool:
        """Whether it ended in a way that no user should see: a stack trace, a crash, "unexpected"."""
        spoken = "Traceback (most recent call last)" in self.output or "glmtune: unexpected" in self.output
        return spoken or (self.code < 0 and not self.is_killed)

    @property
    def says_why(self) -> bool:
        """Whether it failed with a message."""
        return self.code > 0 and not self.is_raw and "glmtune: " in self.output


def missing() -> str | None:
    """Return why nothing can be injected here; None where it can."""
    if not sys.platform.startswith("linux"):
        return "faults are injected on Linux only (LD_PRELOAD)"
    return None if _compiler() else "faults are injected by a library in C, and there is no C compiler here"


@functools.cache
def library() -> Path:
    """Compile `inject.c`, once for each state of it, and return the library."""
    folder = Path(tempfile.mkdtemp(prefix="glmtune-faults-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = folder / f"{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    command = [str(_compiler()), "-shared", "-fPIC", "-O1", str(SOURCE), "-o", str(made), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return made


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def environment(scratch: Path) -> dict[str, str]:
    """Return an environment whose caches lie in a folder of the test's, not of the user's."""
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    caches = {"HF_HOME": str(scratch / "hf"), "MPLCONFIGDIR": str(scratch / "mpl")}
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return {**os.environ, **caches, **own}


class WarmCommands:
    """Runs `glmtune` commands as forks of one process that has imported everything.

    A context manager; one command at a time, so two of them keep two cores busy.
    """

    def __init__(self, scratch: Path) -> None:
        """Remember the folder where logs and caches go.

        Args:
            scratch: exists; nothing below it is watched.
        """
        self._scratch = scratch
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm"],
            cwd=REPO,
            env={**environment(self._scratch), "LD_PRELOAD": str(library())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "the warm process did not start"
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def run(
        self,
        words: Sequence[str],
        cwd: Path,
        *,
        fault: Fault | None = None,
        kill_after: float | None = None,
        timeout: float = 300.0,
        variables: Mapping[str, str] | None = None,
    ) -> Ended:
        """Run one command to its end.

        Args:
            words: after ``glmtune``.
            cwd: its working folder; what it does below it is watched.
            fault: what goes wrong; `Fault()` only counts, None does not even that.
            kill_after: seconds until SIGKILL.
            timeout: seconds until this is an error.
            variables: of its environment, besides.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        log, operations = self._scratch / f"{id(self)}.log", self._scratch / f"{id(self)}.operations"
        operations.unlink(missing_ok=True)
        given = fault.environment(cwd, operations) if fault else {}
        request: dict[str, Any] = {
            "words": list(words),
            "cwd": str(cwd),
            "log": str(log),
            "environment": {**given, **(variables or {})},
            "kill_after": kill_after,
            "timeout": timeout,
        }
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answered = json.loads(process.stdout.readline())
        assert not answered["timed_out"], f"{' '.join(words)}: not done after {timeout} s"
        return Ended(
            answered["code"],
            log.read_text(encoding="utf-8", errors="replace"),
            answered["seconds"],
            tuple(operations.read_text().splitlines()) if operations.exists() else (),
        )
