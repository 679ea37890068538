"""Journals: finished answers of a run, one JSON line each, in files that one process at a time appends to.

A run of hours is interrupted sooner or later, so `glmtune predict` and `glmtune eval` write every answer as
soon as they have it and ask only what is missing when they are started again. In the folder of a run lie

    identity file      what decides the answers (model, data, settings): only the same run may go on
    JOURNAL            one line per answer
    .JOURNAL.lock      locked by the process that writes the journal now, and names it

Lines are appended, so a kill can damage nothing but the last one, which is cut off and its question asked
again. Each line has a checksum: one that something else has damaged is set aside (JOURNAL.damaged) and said,
and costs its own answer only. Lines are handed to the operating system, which survives a kill, and not forced
onto the disk: after a power cut the last seconds may be missing, which costs less than waiting for the disk
at every answer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Generic, Protocol, Self, TypeVar

from glmtune.errors import ConfigError, DataError
from glmtune.storage.checksums import checked_json
from glmtune.storage.files import write_atomically, write_error, write_text_atomically
from glmtune.storage.lock import LOCK_SUFFIX, Lock

Entry = TypeVar("Entry")

DAMAGED_SUFFIX = ".damaged"
"""Of the file beside a journal that keeps the lines taken out of it."""
SHOWN_LINES = 3
"""Damaged lines that are named one by one."""
SHA256 = re.compile(r'"[0-9a-f]{64}"')
SHOWN_DIGITS = 12
"""Digits of a SHA-256 shown in errors: enough to tell two apart, short enough to read."""


class JournalEntry(Protocol):
    """What a journal holds: something that can be written as one line."""

    def to_line(self) -> str:
        """Return one JSON line, newline included."""
        ...


@dataclass(frozen=True, slots=True)
class DamagedLine:
    """A line of a journal that cannot be read.

    Attributes:
        number: from 1.
        raw: its bytes, without the line end.
        reason: why not.
    """

    number: int
    raw: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class JournalContent(Generic[Entry]):
    """What a journal holds.

    Attributes:
        entries: the answers.
        damaged: lines that cannot be read.
        num_torn: bytes at the end that a killed process did not finish.
    """

    entries: list[Entry]
    damaged: list[DamagedLine]
    num_torn: int

    def notes(self, path: Path) -> list[str]:
        """Return what a reader should be told of the journal.

        Args:
            path: of the journal.
        """
        found: list[str] = []
        if self.damaged:
            named = "; ".join(f"line {line.number}: {line.reason}" for line in self.damaged[:SHOWN_LINES])
            more = f"; and {len(self.damaged) - SHOWN_LINES} more" if self.damaged[SHOWN_LINES:] else ""
            found.append(
                f"{path}: {len(self.damaged)} lines cannot be read ({named}{more}). They are moved to"
                f" {path.name}{DAMAGED_SUFFIX}, and their questions asked again."
            )
        if self.num_torn:
            found.append(
                f"{path}: the last line was not finished ({self.num_torn} bytes, a run was killed); it is"
                " dropped and its question asked again."
            )
        return found


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
        # Not the journal itself, which is replaced by its sorted rows, or moved aside, while it is held.
        self._lock = Lock(path.with_name(f".{path.name}{LOCK_SUFFIX}"), guards=path)

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
            self._lock.release()

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

    def repair(self, parse: Callable[[str], Entry]) -> JournalContent[Entry]:
        """Read all answers, cut off a last line that was not finished, and set damaged lines aside.

        Args:
            parse: see `read_journal`.

        Returns:
            What was there; its `JournalContent.notes` are to be shown.

        Raises:
            GlmtuneError: the file cannot be read or written; nothing is lost.
        """
        if not self.path.is_file():
            return JournalContent([], [], 0)
        content = read_journal(self.path, parse)
        try:
            if content.damaged:
                self._set_aside(content)
            elif content.num_torn:
                os.truncate(self.path, self.path.stat().st_size - content.num_torn)
        except OSError as error:
            raise write_error(self.path, error) from None
        return content

    def _set_aside(self, content: JournalContent[Any]) -> None:
        """Keep damaged lines in a file of their own, so that they are said once and nothing is deleted."""
        with self.path.with_name(self.path.name + DAMAGED_SUFFIX).open("ab") as file:
            file.write(b"".join(line.raw + b"\n" for line in content.damaged))
        whole = self.path.read_bytes()
        lines = whole[: len(whole) - content.num_torn].split(b"\n")
        for line in reversed(content.damaged):
            del lines[line.number - 1]
        write_atomically(self.path, lambda path: path.write_bytes(b"\n".join(lines)))

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


def read_journal(path: Path, parse: Callable[[str], Entry]) -> JournalContent[Entry]:
    """Read a journal, passing over a last line that is not finished (its process may be writing it).

    Args:
        path: the journal.
        parse: line to entry; raises ValueError where it is none.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        *lines, unfinished = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"it cannot be read ({error.strerror or error}).", path=path) from None
    entries: list[Entry] = []
    damaged: list[DamagedLine] = []
    num_torn = len(unfinished)
    for number, raw in enumerate(lines, start=1):
        try:
            entries.append(parse(raw.decode("utf-8-sig")))
        except ValueError as error:
            # After a power cut the last block of a file can be there without its content.
            if number == len(lines) and not unfinished:
                num_torn = len(raw) + 1
            else:
                damaged.append(DamagedLine(number, raw, str(error)))
    return JournalContent(entries, damaged, num_torn)


def refuse_foreign_folder(folder: Path, is_ours: Callable[[Path], bool], *, result: str) -> None:
    """Refuse an output folder that holds something else: what users keep there is not moved or replaced.

    Args:
        folder: where a command is to write.
        is_ours: says whether a folder holds what the command writes.
        result: what that is, in words, such as "evaluation".

    Raises:
        ConfigError: the folder holds files, and none of ours among them.
    """
    if not folder.is_dir():
        return
    # Hidden files are those of an earlier start that was refused (locks), or of the system.
    there = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if there and not is_ours(folder):
        shown = ", ".join(there[:SHOWN_LINES]) + (", ..." if there[SHOWN_LINES:] else "")
        raise ConfigError(
            f"`output_dir` is `{folder}`, but it holds files that are no {result} of glmtune ({shown})."
            " They are not moved or replaced: give a new or an empty folder."
        )


def make_run_folder(folder: Path, is_ours: Callable[[Path], bool], *, result: str) -> None:
    """Make the folder of a run, and see that files can be written in it before hours are spent.

    Args:
        folder: of the run.
        is_ours: see `refuse_foreign_folder`.
        result: see `refuse_foreign_folder`.

    Raises:
        ConfigError: it cannot be made or written, or holds something else.
    """
    try:
        refuse_foreign_folder(folder, is_ours, result=result)
    except OSError as error:
        raise ConfigError(
            f"`output_dir` is `{folder}`, but it cannot be read ({error.strerror or error}). Give another"
            " folder."
        ) from None
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
        ValueError: it holds no JSON object, or is damaged.
        DataError: it is there and cannot be read.
    """
    try:
        return checked_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"it cannot be read ({error.strerror or error}).", path=path) from None


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
