"""Files and folders that appear whole or not at all: prepared under another name, forced to disk, renamed.

A rename is the one step that file systems take whole, so everything is written beside its final name first.
The order matters: data is synced before the rename, or a power cut could leave the new name over empty
blocks; the parent folder is synced after it, as the name itself is data of that folder.

One process writes a path at a time, so the name it is prepared under is fixed: a kill leaves at most one
such leftover, which the next attempt overwrites.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from glmtune.errors import ConfigError, GlmtuneError

PARTIAL = ".partial"
REPLACED = ".replaced"


def partial_of(path: Path) -> Path:
    """Return the name under which a file or folder is prepared: hidden, beside it, on the same disk."""
    return path.with_name(f".{path.name}{PARTIAL}")


def replaced_of(path: Path) -> Path:
    """Return the name that the folder in the way of a new one has for the moment between two renames."""
    return path.with_name(f".{path.name}{REPLACED}")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a neighbour of a file, then put that in its place, durably.

    Args:
        path: the file; its folder exists.
        write: given the path to write to.

    Raises:
        OSError: the disk is full or the folder not writable; the old content is kept.
    """
    partial = partial_of(path)
    try:
        write(partial)
        partial.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content, never a part.

    Args:
        path: the file.
        text: its new content, written as UTF-8, line ends as they are.

    Raises:
        OSError: see `write_atomically`.
    """
    content = text.encode("utf-8", "backslashreplace")  # a lone surrogate must not lose a finished run
    write_atomically(path, lambda partial: partial.write_bytes(content))


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file as `write_text` does, for callers that have no better words for a failure than these.

    Raises:
        GlmtuneError: the disk is full or the folder not writable; the old content is kept.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise write_error(path, error) from error


def json_text(values: object) -> str:
    """Word values as JSON that people read: indented, Chinese as itself, with a line end."""
    return json.dumps(values, ensure_ascii=False, indent=2) + "\n"


def write_json(path: Path, values: object) -> None:
    """Write a JSON file as people read it.

    Raises:
        OSError: see `write_atomically`.
    """
    write_text(path, json_text(values))


def begin_folder(final: Path) -> Path:
    """Make the empty folder in which ``final`` is prepared; what a killed attempt left there goes.

    For those who cannot keep a block open until the folder is full; `put_in_place` ends what this begins.

    Raises:
        OSError: the place is not writable.
    """
    partial = partial_of(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


@contextmanager
def prepared_folder(final: Path) -> Generator[Path]:
    """Yield an empty folder to fill, which takes the name ``final`` when the block ends without an error.

    Args:
        final: the folder to appear; one of that name is replaced, and kept if anything fails.

    Yields:
        A folder beside ``final``; it is gone after an error.

    Raises:
        OSError: the disk is full or the place not writable.
    """
    partial = begin_folder(final)
    try:
        yield partial
        put_in_place(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_output(folder: Path, *, overwrite: bool, marker: str, result: str) -> None:
    """Refuse an output folder that holds anything, unless it is an earlier result that may be replaced.

    What a user keeps in a folder named by mistake is never deleted: only a folder with the marker, which our
    commands write last, is known to be ours as a whole.

    Args:
        folder: where a command is to write.
        overwrite: an earlier result may be replaced.
        marker: name of the file that marks such a result.
        result: what the command writes, in words, such as "export".

    Raises:
        ConfigError: the folder is taken.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / marker).is_file():
        raise ConfigError(
            f"`output_dir` is `{folder}`, but it holds files that are no {result} of glmtune (no {marker}), "
            "which are never replaced. Give a new folder."
        )
    if not overwrite:
        raise ConfigError(
            f"`output_dir` is `{folder}`, which holds an earlier {result}. Give a new folder, or add "
            "`overwrite=true` to replace it."
        )


def put_in_place(partial: Path, final: Path) -> None:
    """Give a filled folder its final name, after every byte of it is on disk.

    Folders cannot be renamed over one another, so one in the way is moved aside first: `replaced_of` says
    where a kill between the two renames leaves it. If the second rename fails, it is put back.

    Args:
        partial: the folder with every file in it.
        final: its name from now on.

    Raises:
        OSError: the disk does not take it.
    """
    for path in partial.rglob("*"):
        sync(path)
    sync(partial)
    replaced = replaced_of(final)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file or folder onto the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle of a folder; its file system journals renames itself
    # Windows syncs only what is open for writing.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def _umask() -> int:
    # The only way to read it is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
