"""The folder of an evaluation: a journal per process, continued only by the run that began it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.answer import Answer, parse_answer
from glmtune.errors import DataError
from glmtune.files import json_text, write_text_atomically
from glmtune.journal import Journal, make_run_folder, read_entries, read_identity, refuse_other_run

IDENTITY_NAME = "run.json"
JOURNAL_PATTERN = "journal-rank*.jsonl"
EARLIER = "earlier"
"""Folder, with a number, that keeps what ``resume=false`` found: a flag shall not delete hours of work."""
BEGIN_ANEW = "resume=false"
WAY_OUT = (
    f"Continue with the same, choose another `output_dir`, or begin anew with `{BEGIN_ANEW}` (what is there"
    " is moved aside, not deleted)."
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
    make_run_folder(folder)
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
            with Journal(path) as journal:
                found, num_torn = journal.repair(parse_answer, begin_anew=BEGIN_ANEW)
            if num_torn:
                notes.append(
                    f"{path}: the last line was not finished ({num_torn} bytes, a run was killed); it is"
                    " dropped and its question asked again."
                )
        else:
            found, _ = read_entries(path, parse_answer, begin_anew=BEGIN_ANEW)
        for answer in found:
            # A two-stage question has a line per stage; the second repeats the first and adds the scores.
            known = answers.get(answer.key)
            if known is None or (known.choice_logprobs is None and answer.choice_logprobs is not None):
                answers[answer.key] = answer
    return OpenedRun(answers, tuple(notes))


def _move_aside(folder: Path) -> None:
    """Move everything of an earlier run into the first free ``earlier-N``."""
    there = [path for path in folder.iterdir() if not path.name.startswith((EARLIER, "."))]
    if not there:
        return
    with ExitStack() as locked:
        for path in folder.glob(JOURNAL_PATTERN):
            locked.enter_context(Journal(path))  # a run that is still going keeps its files
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
        there = read_identity(path)
    except ValueError:
        raise DataError(f"it is no valid JSON. {WAY_OUT}", path=path) from None
    refuse_other_run(
        journals[0],
        "answers",
        None if there is None else dict(_leaves(there)),
        dict(_leaves(identity)),
        identity_name=IDENTITY_NAME,
        way_out=WAY_OUT,
    )


def _leaves(values: Any, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield every plain value with its dotted path, so that an error names `model.dtype` alone."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, values
