"""Renames that wait for those who only look: on Windows an open file has no name to give away.

Elsewhere a file can be renamed, or replaced by another, whoever has it open. Windows refuses that for as long
as anybody does: a virus scanner, the search index, an editor, another process that reads the run's log. They
are done within a moment, so the step is tried again. What stays open for longer is the caller's to report.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_SECONDS = 10.0
"""Scanners read a checkpoint of some gigabytes in seconds."""
FIRST_WAIT_SECONDS = 0.01
LONGEST_WAIT_SECONDS = 0.5
REFUSES_OPEN_FILES = os.name == "nt"


def rename(path: Path, new: Path) -> None:
    """Give a file or folder a name that nothing has.

    Args:
        path: exists.
        new: on the same file system.

    Raises:
        OSError: it cannot be renamed; on Windows also where somebody has kept it open for `PATIENCE_SECONDS`.
    """
    _patiently(lambda: path.rename(new))


def replace(path: Path, final: Path) -> None:
    """Put a file in the place of another one, or where there is none.

    Args:
        path: exists.
        final: on the same file system; a file of that name is gone afterwards.

    Raises:
        OSError: see `rename`.
    """
    _patiently(lambda: path.replace(final))


def _patiently(step: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    wait = FIRST_WAIT_SECONDS
    while True:
        try:
            step()
        except PermissionError:  # also how Windows says that a file is open
            if not REFUSES_OPEN_FILES or time.monotonic() + wait > deadline:
                raise
        else:
            return
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)
