"""A run on disk: every finished answer at once, continued only by the run that began it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from evaluation.answer import Answer, parse_answer
from glmtune.errors import ConfigError, DataError
from glmtune.files import json_text, write_error, write_text_atomically

IDENTITY_NAME = "run.json"
JOURNAL_PATTERN = "journal-rank*.jsonl"
EARLIER = "earlier"
WAY_OUT = (
    "Continue with the same, choose another `output_dir`, or begin anew with `resume=false` (what is there is"
    " moved aside, not deleted)."
)


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """What an output folder holds when a run begins or goes on.

    Attributes:
        answers: by subject and index, the fullest one where a sample occurs twice.
        notes: what a reader should be told, such as a dropped half line.
    """

    answers: dict[tuple[str, int], Answer]
    notes: tuple[str, ...]


def journal_path(folder: Path, rank: int) -> Path:
    """Return the journal of one process.

    Args:
        folder: the run's output folder.
        rank: number of the process, from 0.
    """
    return folder / JOURNAL_PATTERN.replace("*", str(rank))


def open_run(folder: Path, identity: Mapping[str, Any], *, resume: bool = True) -> OpenedRun:
    """Begin or continue a run; only one process (rank 0) does this.

    Args:
        folder: made if it is not there.
        identity: plain nested values that decide the answers; kept as ``run.json``.
        resume: go on with what is there; otherwise it is moved to ``earlier-N`` and nothing is deleted.

    Returns:
        The answers there.

    Raises:
        ConfigError: the folder cannot be written, another process writes there, or its answers come from
            another run; the differences are named.
        DataError: a line that is not the last one cannot be read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ConfigError(
            f"`output_dir` is `{folder}`, but it cannot be written ({error.strerror or error}). Give a folder"
            " you may write to, with space left."
        ) from None
    if not resume:
        _move_aside(folder)
    _refuse_other_run(folder, identity)
    opened = read_journals(folder, repair=True)
    text = json_text(identity)
    write_text_atomically(folder / IDENTITY_NAME, text)
    return opened


def read_journals(folder: Path, *, repair: bool = False) -> OpenedRun:
    """Read the journals of all processes.

    Args:
        folder: the run's output folder.
        repair: cut a half-written last line off; otherwise it is passed over (somebody may be writing it).

    Raises:
        ConfigError: with ``repair``, another process still writes one of them.
        DataError: a line that is not the last one cannot be read.
    """
    answers: dict[tuple[str, int], Answer] = {}
    notes: list[str] = []
    for path in sorted(folder.glob(JOURNAL_PATTERN)):
        if repair:
            with path.open("r+b") as file:
                _lock(file, path)
                found, whole_bytes = _read(file.read(), path)
                num_bytes = path.stat().st_size
                if whole_bytes < num_bytes:
                    file.truncate(whole_bytes)
                    notes.append(
                        f"{path}: the last line was not finished ({num_bytes - whole_bytes} bytes, a run was"
                        " killed); it is dropped and its question asked again."
                    )
        else:
            found, _ = _read(path.read_bytes(), path)
        for answer in found:
            known = answers.get(answer.key)
            if known is None or (known.choice_logprobs is None and answer.choice_logprobs is not None):
                answers[answer.key] = answer
    return OpenedRun(answers, tuple(notes))


class JournalWriter:
    """The journal of one process, open for appending; a context manager."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        """Open (or begin) the journal.

        Args:
            folder: the run's output folder; it exists.
            rank: number of this process, from 0.

        Raises:
            ConfigError: another process writes it.
            GlmtuneError: it cannot be opened.
        """
        self.path = journal_path(folder, rank)
        try:
            self._file = self.path.open("ab")
        except OSError as error:
            raise write_error(self.path, error) from None
        _lock(self._file, self.path)

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError as problem:
            if error is None:
                raise write_error(self.path, problem) from None

    def append(self, answer: Answer) -> None:
        """Write one answer and hand it to the operating system at once.

        Args:
            answer: a finished answer, or the first stage of one.

        Raises:
            GlmtuneError: the disk is full or the file not writable; the answers before are kept.
        """
        try:
            self._file.write(answer.to_line().encode("utf-8", "backslashreplace"))
            self._file.flush()
        except OSError as error:
            raise write_error(self.path, error) from None


def _read(content: bytes, path: Path) -> tuple[list[Answer], int]:
    """Return the answers, and how many bytes hold them: without a last line that was not finished."""
    *lines, unfinished = content.split(b"\n")
    answers: list[Answer] = []
    end = 0
    for number, raw in enumerate(lines, start=1):
        try:
            answers.append(parse_answer(raw.decode("utf-8")))
        except ValueError as error:
            if number == len(lines) and not unfinished:
                break
            raise DataError(
                f"{error}. A kill leaves only a last line half-written, so this journal was damaged"
                " otherwise. Remove the line (its question is asked again), or begin anew with"
                " `resume=false`.",
                path=path,
                line=number,
            ) from None
        end += len(raw) + 1
    return answers, end


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{path} is being written by another process: two runs cannot share an `output_dir`. Wait for it,"
            " end it, or choose another `output_dir`."
        ) from None
    except OSError:
        return  # a file system without locks


def _move_aside(folder: Path) -> None:
    """Move everything of an earlier run into the first free ``earlier-N``."""
    there = [path for path in folder.iterdir() if not path.name.startswith((EARLIER, "."))]
    if not there:
        return
    for path in folder.glob(JOURNAL_PATTERN):
        with path.open("r+b") as file:
            _lock(file, path)
    number = 1
    while (folder / f"{EARLIER}-{number}").exists():
        number += 1
    target = folder / f"{EARLIER}-{number}"
    target.mkdir()
    for path in there:
        path.rename(target / path.name)


def _refuse_other_run(folder: Path, identity: Mapping[str, Any]) -> None:
    journals = [path for path in sorted(folder.glob(JOURNAL_PATTERN)) if path.stat().st_size]
    if not journals:
        return
    path = folder / IDENTITY_NAME
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{journals[0]} holds answers, but there is no {IDENTITY_NAME} beside it to tell how they were"
            f" made. {WAY_OUT}"
        ) from None
    except ValueError:
        raise DataError(f"it is no valid JSON. {WAY_OUT}", path=path) from None
    old, new = dict(_leaves(there)), dict(_leaves(identity))
    differing = [key for key in {**old, **new} if old.get(key, "nothing") != new.get(key, "nothing")]
    if differing:
        pairs = "; ".join(
            f"{key}: {old.get(key, 'nothing')} there, {new.get(key, 'nothing')} now" for key in differing
        )
        raise ConfigError(f"{folder} holds answers of another run ({pairs}). {WAY_OUT}")


def _leaves(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every plain value with its dotted path, hashes and all as text."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(values, ensure_ascii=False)
