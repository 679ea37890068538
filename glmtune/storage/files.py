"""Files and folders that appear whole or not at all: prepared under another name, forced to disk, renamed.

A rename is the one step that file systems take whole, so everything is written beside its final name first.
The order matters: data is synced before the rename, or a power cut could leave the new name over empty
blocks; the parent folder is synced after it, as the name itself is data of that folder.

A folder cannot be renamed over another one. Where the system can let two names change places (`exchange`), it
does; elsewhere the old one is moved aside first, and a kill between these two renames leaves it there:

    .NAME.partial      being prepared; whatever a kill left there is overwritten by the next attempt
    NAME               the old folder, or the new one
    .NAME.replaced     the old one on its way out; `put_back` gives it its name again if NAME is not there

One process writes a path at a time, so the name it is prepared under is fixed: a kill leaves at most one
such leftover, which the next attempt overwrites.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from glmtune.errors import CheckpointError, ConfigError, GlmtuneError
from glmtune.storage.exchange import exchange
from glmtune.storage.renames import rename, replace

PARTIAL = ".partial"
REPLACED = ".replaced"
SYSTEM_ERROR = re.compile(r"\bos error (\d+)|\bOs \{ code: (\d+)")
"""How Rust's libraries name an error of the system."""
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)
"""What file systems answer to the wish to sync a folder that know no such thing."""


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
        OSError: the disk is full or the folder not writable, in whatever class a library says so; the old
            content is kept.
    """
    partial = partial_of(path)
    try:
        with system_errors():
            write(partial)
        partial.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        sync(partial)
        replace(partial, path)
        sync(path.parent)
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
    put_back(final)
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
        OSError: the disk is full or the place not writable, in whatever class a library says so.
    """
    partial = begin_folder(final)
    try:
        with system_errors():
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


def real_place(path: Path) -> Path:
    """Return where a folder is to appear: a link stays, and what it points to is written.

    Args:
        path: as the user names it.
    """
    path = path.expanduser()
    return path.resolve() if path.is_symlink() else path


def put_in_place(partial: Path, final: Path) -> None:
    """Give a filled folder its final name, after every byte of it is on disk.

    Args:
        partial: the folder with every file in it.
        final: its name from now on; a folder of that name is removed.

    Raises:
        OSError: the disk does not take it; ``final`` is the old folder or the new one, whole.
    """
    for path in partial.rglob("*"):
        sync(path)
    sync(partial)
    replaced = replaced_of(final)
    shutil.rmtree(replaced, ignore_errors=True)
    if not final.exists():
        rename(partial, final)
    elif exchange(partial, final):
        with contextlib.suppress(OSError):  # the new one is in its place, whatever becomes of the old one
            partial.rename(replaced)
    else:
        _rename_twice(partial, final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _rename_twice(partial: Path, final: Path) -> None:
    while True:
        rename(final, replaced_of(final))
        try:
            rename(partial, final)
        except OSError as error:
            put_back(final)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # a reader has put it back before us
                raise
        else:
            return


def put_back(final: Path) -> None:
    """Give a folder its name again that a kill left under its second one, if it did.

    For whoever is about to replace the folder, and for readers who miss it: one that is being replaced just
    now is back under its name a moment later, the old one or the new.
    """
    with contextlib.suppress(OSError):
        if not final.exists() and replaced_of(final).exists():
            replaced_of(final).rename(final)


def sync(path: Path) -> None:
    """Force a file or folder onto the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle of a folder; its file system journals renames itself
    # Windows syncs only what is open for writing.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC or not path.is_dir():  # some network file systems sync no folder
            raise
    finally:
        os.close(handle)


@contextmanager
def system_errors() -> Generator[None]:
    """Raise OSError for what libraries wrap in errors of their own: a full disk is one, whoever wrote.

    The libraries in Rust (safetensors, tokenizers) raise their own class, or plain Exception, and have the
    number of the system's error in the text.

    Raises:
        OSError: in place of such an error.
    """
    try:
        yield
    except (OSError, GlmtuneError):
        raise
    except Exception as error:
        found = SYSTEM_ERROR.search(str(error))
        if found is None:
            raise
        code = int(found[1] or found[2])
        raise OSError(code, os.strerror(code)) from error


def is_disk_full(error: OSError) -> bool:
    """Tell whether an error is that there is no room left: on the disk, or for this user."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None), errno.EFBIG)


def folder_error(folder: Path, error: OSError) -> CheckpointError:
    """Word the failure to write a folder that appears as a whole: what happened, and that nothing is lost.

    Args:
        folder: which did not appear.
        error: what the system said.
    """
    said = error.strerror or str(error)
    reason = f"there is no room left on its disk ({said})" if is_disk_full(error) else said
    way_out = (
        "Free some space there, or give another `output_dir`"
        if is_disk_full(error)
        else ("Give an `output_dir` that you may write to")
    )
    return CheckpointError(
        f"`{folder}` could not be written: {reason}. What was there before is as it was. {way_out}, and run"
        " the same command again."
    )


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
