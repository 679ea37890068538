"""Write files so that a kill or a full disk never leaves half of one."""

from __future__ import annotations

import os
from pathlib import Path

from glmtune.errors import GlmtuneError


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part.

    Args:
        path: the file.
        text: its new content, written as UTF-8.

    Raises:
        GlmtuneError: the disk is full or the folder not writable; the old content is kept.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> GlmtuneError:
    """Word the failure to write a file: what happened, and that nothing before it is lost.

    Args:
        path: the file.
        error: what the system said.
    """
    return GlmtuneError(
        f"{path} cannot be written ({error.strerror or error}); what was there before is kept. Make room or"
        " give a folder you may write to, and run the same command again: it goes on where it stopped."
    )
