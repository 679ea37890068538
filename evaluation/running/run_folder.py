"""The folder of an evaluation: a journal per process, continued only by the run that began it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.answer import Answer, Key, parse_answer
from evaluation.running.fingerprint import QUESTIONS, differ_in_questions_only
from evaluation.running.run_files import EARLIER, IDENTITY_NAME, JOURNAL_PATTERN, files_of_run, is_evaluation
from glmtune.errors import DataError
from glmtune.storage.checksums import json_with_checksum
from glmtune.storage.files import json_text, write_text_atomically
from glmtune.storage.journal import (
    Journal,
    journals_in,
    make_run_folder,
    read_identity,
    read_journal,
    refuse_other_run,
)
from glmtune.storage.renames import rename

MAX_DEPTH = 8
"""More than an identity is deep; what lies deeper in a file edited by hand is compared whole."""
BEGIN_ANEW = "resume=false"
WAY_OUT = (
    f"Continue with the same, choose another `output_dir`, or begin anew with `{BEGIN_ANEW}` (what is there"
    " is moved aside, not deleted)."
)


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """What an output folder holds when a run begins or goes on.

    Attributes:
        answers: by subject and index.
        notes: what a reader should be told, such as a dropped half line.
    """

    answers: dict[Key, Answer]
    notes: tuple[str, ...]


def journal_path(folder: Path, rank: int) -> Path:
    """Return the journal of one process.

    Args:
        folder: the run's output folder.
        rank: number of the process, from 0.
    """
    return folder / JOURNAL_PATTERN.replace("*", str(rank))


def lock_run(folder: Path) -> Journal:
    """Make the folder of a run and lock the first process's journal; a context manager.

    Rank 0 holds it from before it opens the run until every question is answered, so a second launch into
    the folder is refused whatever the first is doing.

    Raises:
        ConfigError: the folder cannot be written, holds something else, or another process writes there.
    """
    make_run_folder(folder, is_evaluation, result="evaluation")
    return Journal(journal_path(folder, 0))


RefuseOthers = Callable[[Path, Collection[Answer]], None]
"""Raises ConfigError where answers of a folder are not to the questions asked now."""


def open_run(
    journal: Journal,
    identity: Mapping[str, Any],
    *,
    resume: bool = True,
    refuse_others: RefuseOthers | None = None,
) -> OpenedRun:
    """Begin or continue a run; only one process (rank 0) does this.

    Args:
        journal: of the first process, see `lock_run`.
        identity: plain nested values that decide the answers; kept as ``run.json``.
        resume: go on with what is there; otherwise it is moved to ``earlier-N`` and nothing is deleted.
        refuse_others: asked where the questions alone are others than those the run was begun with; None
            refuses all such runs.

    Returns:
        The answers there; half-written last lines are cut off, damaged ones set aside.

    Raises:
        ConfigError: another process still writes one of the journals, or their answers come from another run;
            the differences are named.
        DataError: the identity of the run there cannot be read.
    """
    folder = journal.path.parent
    with ExitStack() as others:
        # A launch may have lost its first process and still have others that write.
        paths = (path for path in journals_in(folder, JOURNAL_PATTERN) if path != journal.path)
        journals = [journal, *(others.enter_context(Journal(path)) for path in paths)]
        if not resume:
            _move_aside(folder)
        _refuse_other_run(folder, identity, refuse_others)
        answers: list[Answer] = []
        notes: list[str] = []
        for each in journals:
            content = each.repair(parse_answer)
            answers += content.entries
            notes += content.notes(each.path)
        write_text_atomically(folder / IDENTITY_NAME, json_text(json_with_checksum(identity)))
    return OpenedRun(_fullest(answers), tuple(notes))


def read_journals(folder: Path) -> dict[Key, Answer]:
    """Read the answers in the journals of all processes, while these may be writing them.

    Args:
        folder: the run's output folder.

    Returns:
        By subject and index; lines that cannot be read are passed over, `open_run` speaks of them.

    Raises:
        DataError: a file cannot be read.
    """
    answers: list[Answer] = []
    for path in sorted(folder.glob(JOURNAL_PATTERN)):
        answers += read_journal(path, parse_answer).entries
    return _fullest(answers)


def _fullest(answers: Sequence[Answer]) -> dict[Key, Answer]:
    """Return one answer per question.

    A two-stage question has a line per stage; the second repeats the first and adds the scores.
    """
    found: dict[Key, Answer] = {}
    for answer in answers:
        known = found.get(answer.key)
        if known is None or (known.choice_logprobs is None and answer.choice_logprobs is not None):
            found[answer.key] = answer
    return found


def _move_aside(folder: Path) -> None:
    """Move the files of an earlier run into the first free ``earlier-N``; what users put there stays."""
    there = files_of_run(folder)
    if not there:
        return
    number = 1
    while (folder / f"{EARLIER}-{number}").exists():
        number += 1
    target = folder / f"{EARLIER}-{number}"
    target.mkdir()
    for path in there:
        rename(path, target / path.name)


def _refuse_other_run(folder: Path, identity: Mapping[str, Any], refuse_others: RefuseOthers | None) -> None:
    journals = [path for path in sorted(folder.glob(JOURNAL_PATTERN)) if path.stat().st_size]
    if not journals:
        return
    there = _identity_in(folder)
    # A run may go on with more questions (a higher limit, more subjects): then each answer that is there is
    # held against its question, as no hash of all questions can be the same.
    if refuse_others is not None and there is not None and differ_in_questions_only(there, identity):
        if any(there.get(name) != value for name, value in identity.items() if name in QUESTIONS):
            refuse_others(folder, read_journals(folder).values())
        return
    _refuse_other_identity(journals[0], there, identity)


def refuse_other_run_of(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to add to a run that another process has opened for another model, task or decoding.

    Args:
        folder: of the run.
        identity: of what this process would add.

    Raises:
        ConfigError: they differ; every difference is named.
    """
    _refuse_other_identity(folder / IDENTITY_NAME, _identity_in(folder), identity)


def _identity_in(folder: Path) -> Mapping[str, Any] | None:
    path = folder / IDENTITY_NAME
    try:
        return read_identity(path)
    except ValueError as error:
        raise DataError(f"it is no valid JSON ({error}). {WAY_OUT}", path=path) from None


def _refuse_other_identity(
    holder: Path, there: Mapping[str, Any] | None, identity: Mapping[str, Any]
) -> None:
    refuse_other_run(
        holder,
        "answers",
        None if there is None else dict(_leaves(there)),
        dict(_leaves(identity)),
        identity_name=IDENTITY_NAME,
        way_out=WAY_OUT,
    )


def _leaves(values: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yield every plain value with its dotted path, so that an error names `model.dtype` alone."""
    if isinstance(values, Mapping) and depth < MAX_DEPTH:
        for key, value in values.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key), depth + 1)
    else:
        yield path, values
