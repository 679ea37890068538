"""Journals: finished answers of a run, one JSON line each, in files that one process at a time appends to.

A run of hours is interrupted sooner or later, so `glmtune predict` and `glmtune eval` write every answer as
soon as they have it and ask only what is missing when they are started again. In the folder of a run lie

    identity file      what decides the answers (model, data, settings): only the same run may go on
    JOURNAL            one line per answer
    .JOURNAL.lock      locked by the process that writes the journal now, and names it

Lines are appended, so a kill can damage nothing but the last one, which is cut off and its question asked
again. Lines are handed to the operating system, which survives a kill, and not forced onto the disk: after
a power cut the last seconds may be missing, which costs less than waiting for the disk at every answer.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self, TypeVar

from glmtune.errors import ConfigError, DataError
from glmtune.files import write_error, write_text_atomically

LOGGER = logging.getLogger(__name__)
Entry = TypeVar("Entry")

HOLDER_BYTES = 500
"""More than the words that name a process take."""
LOCK_SUFFIX = ".lock"
SHA256 = re.compile(r'"[0-9a-f]{64}"')
SHOWN_DIGITS = 12
"""Digits of a SHA-256 shown in errors: enough to tell two apart, short enough to read."""


class JournalEntry(Protocol):
    """What a journal holds: something that can be written as one line."""

    def to_line(self) -> str:
        """Return one JSON line, newline included."""
        ...


class Journal:
    """A journal that this process alone may write until the context ends or the process does.

    Attributes:
        path: the file; it is made by the first answer.
    """

    def __init__(self, path: Path) -> None:
        """Lock the journal, so that two runs never answer the same questions twice into one file.

        Args:
            path: the file; its folder exists.

        Raises:
            ConfigError: another process writes it; which one is said.
            GlmtuneError: the folder is not writable.
        """
        self.path = path
        self._file: BinaryIO | None = None
        self._lock = _lock_of(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close_file()
        except OSError as problem:
            if error is None:
                raise write_error(self.path, problem) from None
        finally:
            os.close(self._lock)

    def append(self, entry: JournalEntry) -> None:
        """Write one answer at the end and hand it to the operating system at once.

        Raises:
            GlmtuneError: the disk is full or the file not writable; the answers before are kept.
        """
        try:
            if self._file is None:
                self._file = self.path.open("ab")
            # A model may cut a surrogate pair in two, and half of one is no valid UTF-8.
            self._file.write(entry.to_line().encode("utf-8", "backslashreplace"))
            self._file.flush()
        except OSError as error:
            raise write_error(self.path, error) from None

    def repair(self, parse: Callable[[str], Entry], *, begin_anew: str) -> tuple[list[Entry], int]:
        """Read all answers and cut off a last line that was not finished.

        Args:
            parse: see `read_entries`.
            begin_anew: see `read_entries`.

        Returns:
            The answers, and how many bytes were cut off.

        Raises:
            DataError: see `read_entries`.
            GlmtuneError: the file may not be written.
        """
        if not self.path.is_file():
            return [], 0
        entries, num_bytes = read_entries(self.path, parse, begin_anew=begin_anew)
        num_torn = self.path.stat().st_size - num_bytes
        if num_torn:
            try:
                os.truncate(self.path, num_bytes)
            except OSError as error:
                raise write_error(self.path, error) from None
        return entries, num_torn

    def rewrite(self, entries: Iterable[JournalEntry]) -> None:
        """Replace the content by these answers in one step.

        Raises:
            GlmtuneError: the disk is full; the old content is kept.
        """
        self._close_file()  # it would go on in the file that is replaced; Windows replaces no open file
        write_text_atomically(self.path, "".join(entry.to_line() for entry in entries))

    def _close_file(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


def journals_in(folder: Path, pattern: str) -> list[Path]:
    """Return the journals of a folder, and those that a process may hold without having written yet.

    Args:
        folder: of a run.
        pattern: of the journals' names.
    """
    locks = folder.glob(f".{pattern}{LOCK_SUFFIX}")
    held = (folder / lock.name[1 : -len(LOCK_SUFFIX)] for lock in locks)
    return sorted({*folder.glob(pattern), *held})


def read_entries(path: Path, parse: Callable[[str], Entry], *, begin_anew: str) -> tuple[list[Entry], int]:
    """Read a journal, passing over a last line that is not finished (its process may be writing it).

    Args:
        path: the journal.
        parse: line to entry; raises ValueError where it is none.
        begin_anew: the setting that begins without the answers there, for the message.

    Returns:
        The answers, and how many bytes from the first hold them.

    Raises:
        DataError: a line before the last one cannot be read.
    """
    *lines, unfinished = path.read_bytes().split(b"\n")
    entries: list[Entry] = []
    num_bytes = 0
    for number, raw in enumerate(lines, start=1):
        try:
            entries.append(parse(raw.decode("utf-8-sig")))
        except ValueError as error:
            # After a power cut the last block of a file can be there without its content.
            if number == len(lines) and not unfinished:
                break
            raise DataError(
                f"{error}. A kill leaves only a last line half-written, so this journal was damaged"
                " otherwise. Remove the line (its question is asked again), or begin anew with"
                f" `{begin_anew}`.",
                path=path,
                line=number,
            ) from None
        num_bytes += len(raw) + 1
    return entries, num_bytes


def make_run_folder(folder: Path) -> None:
    """Make the folder of a run, and see that files can be written in it before hours are spent.

    Raises:
        ConfigError: it cannot be made or written.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"`output_dir` is `{folder}`, but it cannot be written ({error.strerror or error}). Give a folder"
            " you may write to, with space left."
        ) from None


def read_identity(path: Path) -> Mapping[str, Any] | None:
    """Read an identity file; None if there is none.

    Raises:
        ValueError: it holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    return values


def refuse_other_run(
    journal: Path,
    holds: str,
    there: Mapping[str, object] | None,
    here: Mapping[str, object],
    *,
    identity_name: str,
    way_out: str,
) -> None:
    """Refuse to mix answers that were made differently in one journal.

    Args:
        journal: a file with answers.
        holds: what it holds, such as "3 rows".
        there: the values that decided them; None if they are not known.
        here: the values that decide the answers to come.
        identity_name: of the file that keeps these values.
        way_out: what the user may do.

    Raises:
        ConfigError: the values differ, each of them named, or are not known.
    """
    if there is None:
        raise ConfigError(
            f"{journal} holds {holds}, but there is no {identity_name} beside it to tell how they were made."
            f" {way_out}"
        )
    here = json.loads(json.dumps(here))  # as it would be read back: tuples are lists
    differing = [
        name
        for name in {**there, **here}
        if name not in there or name not in here or there[name] != here[name]
    ]
    if differing:
        differences = "; ".join(
            f"{name}: {_shown(there, name)} there, {_shown(here, name)} now" for name in differing
        )
        raise ConfigError(f"{journal} holds {holds} of another run ({differences}). {way_out}")


def _shown(values: Mapping[str, object], name: str) -> str:
    if name not in values:
        return "nothing"
    text = json.dumps(values[name], ensure_ascii=False)
    return f'{text[: 1 + SHOWN_DIGITS]}..."' if SHA256.fullmatch(text) else text


# ---- the lock ----
#
# The operating system drops it when its process dies, however it dies; a file whose mere presence is the
# lock would stay. (The package `filelock` makes such files where flock is missing, so it is not used.)
# Not the journal itself is locked but a file beside it that is never renamed or removed: a journal is
# replaced by its sorted rows, or moved aside, while it is held.

if sys.platform == "win32":
    import msvcrt

    LOCKED_BYTE = 1 << 30
    """Windows' locks keep others from reading too, so a byte is locked that lies far behind the text."""

    def _try_lock(handle: int) -> None:
        os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _try_lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_of(path: Path) -> int:
    """Lock a journal; returns the open handle that keeps it locked."""
    lock_path = path.with_name(f".{path.name}{LOCK_SUFFIX}")
    try:
        handle = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)  # not emptied: it names another process
    except OSError as error:
        raise write_error(lock_path, error) from None
    try:
        _try_lock(handle)
    except (BlockingIOError, PermissionError):  # of Unix; of Windows
        os.lseek(handle, 0, os.SEEK_SET)
        holder = os.read(handle, HOLDER_BYTES).decode("utf-8", "replace").strip()
        os.close(handle)
        raise ConfigError(
            f"{path} is being written by another process{f' ({holder})' if holder else ''}: two runs cannot"
            " share an `output_dir`. Wait for it, end it, or choose another `output_dir`."
        ) from None
    except OSError as error:
        # Some network file systems have no locks, and a run there is better than none.
        LOGGER.warning(
            "%s: files cannot be locked here (%s), so nothing keeps a second process from answering the same"
            " questions into this folder. Start only one.",
            path, error.strerror or error,
        )  # fmt: skip
    with contextlib.suppress(OSError):  # a full disk is reported by the answers themselves
        began = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}, since {began}\n".encode())
    return handle
