"""Processes of a run end when whoever started them is gone, however that went.

A launcher that is told to stop tells its processes. One that is killed (SIGKILL, no memory left, a lost
connection) cannot, and they would train on, unseen, while the same command is started again. So each of them
watches:

    torchrun, deepspeed, ours         a look at the parent every `POLL_SECONDS`, in a thread of each process
    a command that `sweep` starts     the same look, at `sweep`
    ours, started over ssh            a line from the head every few seconds, on standard input

and ends with all that it has started itself. Files that it was writing have no name yet (see
`glmtune.storage.files`), so nothing half-written looks complete.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

LAUNCHED = "GLMTUNE_LAUNCHED"
"""Set in processes that we start, to the number of the launcher: they write their error to a file, and the
launcher shows one of them."""
STARTED_BY = "GLMTUNE_STARTED_BY"
"""Set for a whole command that another one starts (`glmtune sweep`), to the number of the starter."""
HEAD = "GLMTUNE_HEAD"
"""Set in launchers that are started over ssh: they hear from the head on standard input."""
POLL_SECONDS = 0.2
HEAD_SECONDS = 5.0
"""Between two lines of the head."""
SILENCE_SECONDS = 60.0
"""Without a line for so long, the head or the way to it is gone."""
LAUNCHERS = frozenset({"torchrun", "deepspeed", "accelerate", "glmtune", "__main__.py"})
LAUNCHER_MODULES = ("torch.distributed.", "deepspeed.launcher.", "accelerate.commands.", "glmtune")
PR_SET_PDEATHSIG = 1  # of Linux' prctl.h

_watching = 0


def is_started() -> bool:
    """Tell whether this is one of a run's processes, whoever started it (torchrun, deepspeed, we)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def watch() -> None:
    """Let this process end when its launcher is gone, and processes forked by this one when it is."""
    global _watching
    if _watching == os.getpid():
        return
    _watching = os.getpid()
    if sys.platform == "linux":
        _end_forked_children()
    if os.environ.pop(HEAD, None):
        threading.Thread(target=_listen, name="glmtune-head", daemon=True).start()
    starter = os.environ.pop(STARTED_BY, "")  # not what processes of this one are to look for
    if not (is_started() or starter):
        return
    above, expected = _ancestors(), starter or os.environ.get(LAUNCHED, "")
    number = int(expected) if expected.isdigit() else None
    # Not the parent alone: the Python of a virtual environment on Windows starts another one, which we are.
    if number is not None and number not in (os.getppid(), *(process.pid for process in above)):
        _end()  # it was killed while we were being started
    if os.getppid() > 1:  # 1 is the system, or the program of a container, with which everything in it ends
        watched = _launchers(above, number)
        threading.Thread(target=_poll, args=(watched,), name="glmtune-parent", daemon=True).start()


def _launchers(above: Sequence[psutil.Process], starter: int | None) -> Sequence[psutil.Process]:
    """Return the parent, and those above it up to the topmost launcher: DeepSpeed's runs another one."""
    tops = [index for index, process in enumerate(above) if process.pid == starter or _is_launcher(process)]
    return above[: 1 + max(tops, default=0)]


def _ancestors() -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process().parents()
    return []


def _is_launcher(process: psutil.Process) -> bool:
    """Tell whether a process is Python running a launcher; a shell that names one in its words is none."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return bool(words) and "python" in Path(words[0]).name.lower() and _runs_launcher(words[1:])


def _runs_launcher(words: Sequence[str]) -> bool:
    rest = iter(words)
    for word in rest:
        if word == "-m":
            return next(rest, "").startswith(LAUNCHER_MODULES)
        if word in ("-W", "-X"):
            next(rest, "")
        elif not word.startswith("-"):
            return Path(word).name in LAUNCHERS
    return False


def _poll(launchers: Sequence[psutil.Process]) -> None:
    while all(_lives(process) for process in launchers):
        time.sleep(POLL_SECONDS)
    _end()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _end() -> None:
    """End this process and all below it, without a word to the others: they do the same."""
    for child in _descendants():
        with contextlib.suppress(psutil.Error):
            child.kill()
    os._exit(1)


def _descendants() -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        yield from psutil.Process().children(recursive=True)


def _listen() -> None:
    """Stop, as after SIGTERM, when the head has been silent for long or the connection has ended.

    In order, with a last checkpoint: nobody waits for this machine, and the head may have been told to stop.
    """
    with contextlib.suppress(OSError, ValueError):
        while select.select([0], [], [], SILENCE_SECONDS)[0] and os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def _end_forked_children() -> None:
    """Have Linux kill a forked child (a data loader's worker, a pool's) in the moment this process dies.

    Only of forks by the main thread: the kernel takes the end of the forking thread for that of the parent.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    forked_by: list[tuple[int, bool]] = [(0, False)]

    def before() -> None:
        forked_by[0] = os.getpid(), threading.current_thread() is threading.main_thread()

    def in_child() -> None:
        parent, is_main = forked_by[0]
        if is_main:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

    os.register_at_fork(before=before, after_in_child=in_child)
