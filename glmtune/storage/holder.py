"""Who holds a lock: what its file says of a process, and whether that process is still there."""

from __future__ import annotations

import json
import os
import socket
import sys
import uuid
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import psutil

START_TOLERANCE_SECONDS = 5.0
"""Systems tell the start of a process from a clock that may be set in between."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its file says.

    Attributes:
        host: name of the machine.
        pid: number of the process there.
        started: when that process began, in seconds since 1970; tells it from a later one of that number.
        command: what it runs.
        machine: identity of the running system, as two containers may have one name; may be empty.
        token: of this one taking.
        parent: number of the process above it where that is a launcher, with which it ends; else 0.
    """

    host: str
    pid: int
    started: float
    command: str
    machine: str
    token: str
    parent: int = 0

    def __str__(self) -> str:
        began = datetime.fromtimestamp(self.started).astimezone().isoformat(sep=" ", timespec="seconds")
        # The file may hold anything, and terminals obey escape sequences.
        host, command = ("".join(c if c.isprintable() else "?" for c in x) for x in (self.host, self.command))
        return f"process {self.pid} on {host}, since {began}: {command}"

    @property
    def is_here(self) -> bool:
        """Whether the process runs, or ran, in this system."""
        return (self.host, self.machine) == (socket.gethostname(), this_machine())

    @property
    def is_alive(self) -> bool:
        """Whether the process, which ran in this system, still does."""
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.started) < START_TOLERANCE_SECONDS
            return is_same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.AccessDenied:
            return True
        except psutil.NoSuchProcess:
            return False

    @property
    def is_ending(self) -> bool:
        """Whether the process, which ran in this system, is on its way out: killed, or an orphan."""
        try:
            process = psutil.Process(self.pid)
            is_orphan = self.parent not in (0, process.ppid())
            # The system takes the memory of a process before it closes its files.
            return not self.is_alive or is_orphan or process.memory_info().rss == 0
        except psutil.AccessDenied:
            return False
        except psutil.NoSuchProcess:
            return True


def this_process() -> Holder:
    """Return the holder that this process is, with a token of its own for each call."""
    began = psutil.Process().create_time()
    token = uuid.uuid4().hex
    return Holder(socket.gethostname(), os.getpid(), began, _command(), this_machine(), token, _launcher())


def parse_holder(content: bytes) -> Holder | None:
    """Return the holder that a lock file names; None where it is empty or something else."""
    try:
        values: Any = json.loads(content.decode("utf-8", "replace"))
        host, command, machine, token = (
            str(values[name]) for name in ("host", "command", "machine", "token")
        )
        pid, parent = int(values["pid"]), int(values.get("parent", 0))
        holder = Holder(host, pid, float(values["started"]), command, machine, token, parent)
        str(holder)  # a time that is none cannot be said
    except (ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError):
        return None
    return holder


@cache
def this_machine() -> str:
    """Return what tells this running system, and this container, from others; empty where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _launcher() -> int:
    return os.getppid() if "RANK" in os.environ else 0  # as torchrun and all others name their processes


def _command() -> str:
    """Return what this process runs: no settings, which may hold a key."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    if program not in ("glmtune", "glmtune.exe", "__main__.py"):
        return program or Path(sys.executable).name
    return " ".join(["glmtune", *sys.argv[1:2]])
