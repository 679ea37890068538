"""Two names change places in one step, where the system can: readers find old or new, never neither."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2
"""Of Linux' renameat2 (fcntl.h); `RENAME_SWAP` of macOS' renamex_np has the same value."""
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What file systems answer that cannot: NFS and many on FUSE."""


def exchange(one: Path, other: Path) -> bool:
    """Swap two files or folders of one file system, if it can.

    Args:
        one: exists.
        other: exists.

    Returns:
        Whether they were swapped; False where there is no such step.

    Raises:
        OSError: there is, but it failed.
    """
    swap = _swap()
    if swap is None:
        return False
    if swap(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@cache
def _swap() -> Callable[[bytes, bytes], int] | None:
    """Return the system's function; None on Windows and in old C libraries."""
    if sys.platform not in ("linux", "darwin"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        rename = getattr(libc, "renamex_np", None)
        return None if rename is None else lambda one, other: rename(one, other, RENAME_EXCHANGE)
    rename = getattr(libc, "renameat2", None)
    if rename is None:
        return None
    return lambda one, other: rename(AT_FDCWD, one, AT_FDCWD, other, RENAME_EXCHANGE)
