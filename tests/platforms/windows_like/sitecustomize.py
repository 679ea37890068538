"""Makes this Python as poor as one on Windows, as far as our code could notice; Python imports it by itself.

    gone         fcntl, resource, termios, pwd, grp, pty, tty, readline; os.fork, setsid, geteuid and their like;
                 signals that Windows does not know; anonymous maps of Unix
    otherwise    processes are spawned, not forked; a file that is open or mapped here is not renamed, replaced or
                 deleted (PermissionError, as there), nor is a folder above it; two names do not change places
    and          text files opened by us without an encoding are an error

Left as it is what PyTorch and the standard library of Linux need to run at all, by `sys.platform`.
"""

from __future__ import annotations

import builtins
import multiprocessing
import os
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path

OURS = re.compile(r"(glmtune|evaluation|recipes)\b")
MODULES = ("fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")
OF_OS = (
    "fork forkpty setsid setpgid getpgid getpgrp getsid killpg getuid geteuid getgid getegid setuid sched_getaffinity "
    "pread pwrite nice getpriority getloadavg mkfifo openpty chroot"
)
# Kept: SIGKILL and SIGCHLD, which PyTorch's loaders and subprocess use on Linux.
OF_SIGNAL = "SIGHUP SIGUSR1 SIGUSR2 SIGQUIT SIGALRM SIGPIPE SIGTSTP SIGWINCH SIGTTOU SIGTTIN SIGSTOP SIGCONT"

imported = builtins.__import__


def _imported(name, globals=None, locals=None, fromlist=(), level=0):  # type: ignore[no-untyped-def]
    # To ours alone: libraries import them wherever `sys.platform` says Linux.
    if name in MODULES and OURS.match((globals or {}).get("__name__", "")):
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)
    return imported(name, globals, locals, fromlist, level)


builtins.__import__ = _imported
for module, names in ((os, OF_OS), (signal, OF_SIGNAL)):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
os.environ.setdefault("USERNAME", "somebody")  # by which Windows names the user
multiprocessing.set_start_method("spawn", force=True)
warnings.filterwarnings("error", category=EncodingWarning, module=OURS.pattern)

PROCESS = Path("/proc/self")


def _in_use() -> set[str]:
    """Return the files that this process has open or mapped."""
    found = set()
    for handle in os.listdir(PROCESS / "fd"):
        try:
            found.add(os.readlink(PROCESS / "fd" / handle))
        except OSError:
            continue
    for line in (PROCESS / "maps").read_text(encoding="utf-8", errors="replace").splitlines():
        found.add(line[line.find("/") :])
    return found


def _refuse_open(path: object) -> None:
    if sys._getframe(2).f_code.co_filename.endswith("tempfile.py"):
        return  # on Windows it has the system delete an open file, by a flag
    whole = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]
    for used in _in_use():
        if used == whole or used.startswith(whole + os.sep):
            raise PermissionError(13, f"another handle has {used} open (WinError 32)", whole)


def _guarded(name: str) -> None:
    plain = getattr(os, name)

    def guarded(path, *rest, **more):  # type: ignore[no-untyped-def]
        if not more.get("dir_fd") and not more.get("src_dir_fd"):
            _refuse_open(path)
            if name in ("rename", "replace"):
                _refuse_open(rest[0])
        if name == "rename" and os.path.lexists(rest[0]):
            raise FileExistsError(17, "there is one of that name (WinError 183)", rest[0])
        return plain(path, *rest, **more)

    setattr(os, name, guarded)


for name in ("rename", "replace", "unlink", "remove", "rmdir"):
    _guarded(name)
shutil._use_fd_functions = False  # rmtree by names, which the guards see

if os.environ.get("GLMTUNE_WINDOWS_LIKE") != "bare":
    from glmtune.storage import exchange, lock, renames

    exchange._swap = lambda: None
    renames.REFUSES_OPEN_FILES, renames.PATIENCE_SECONDS = True, 0.5
    lock.SETTLE_SECONDS = 0.05
