"""Saved completions: answers of any tool, one JSON object per line, scored without a model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.answer import Answer, Key, parse_answer
from evaluation.backend import ModelIdentity
from evaluation.running.fingerprint import saved_identity
from evaluation.running.run_files import JOURNAL_PATTERN
from evaluation.task import CHOICES, GENERATE, Task
from glmtune.errors import ConfigError, DataError, unknown_name

FORM = (
    "One object per line: `subject`, `index` (row in the official file, from 0) and `completion` or"
    " `choice_logprobs`."
)


@dataclass(frozen=True, slots=True)
class SavedAnswers:
    """Saved answers matched to the questions of a task.

    Attributes:
        task: the task, cut down to the questions answered if that was allowed.
        answers: in the order of its samples.
        identity: names the file and its content in place of a model.
    """

    task: Task
    answers: tuple[Answer, ...]
    identity: ModelIdentity


def read_saved(
    path: Path, task: Task, *, allow_missing: bool = False, model: str | None = None
) -> SavedAnswers:
    """Read saved completions of a task.

    Args:
        path: the file, or the output folder of an earlier run (its journals are read).
        task: the questions; where it is partial, lines about others are passed over.
        allow_missing: take questions without an answer out; the result is then partial.
        model: whose completions they are; None names the file.

    Raises:
        ConfigError: there is no such file.
        DataError: a line cannot be read; a question is unknown, answered twice, or (unless allowed) never.
    """
    files = _files(path)
    samples = {sample.key: sample for sample in task.samples}
    found: dict[Key, tuple[Answer, Path, int]] = {}
    digest = hashlib.sha256()
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"it cannot be read ({error.strerror or error}).", path=file) from None
        digest.update(content)
        for number, answer in _lines(content, file):
            # A file of all answers may be scored on a few subjects.
            if answer.key not in samples and task.is_partial:
                continue
            if answer.key not in samples:
                raise _unknown(answer, task, file, number)
            _check_parts(answer, task, file, number)
            if answer.key in found and not _is_first_stage(found[answer.key][0], answer):
                _, other, line = found[answer.key]
                raise DataError(
                    f"`{answer.subject}` {answer.index} is answered a second time (first in {other}, line"
                    f" {line}). Keep one line per question.",
                    path=file,
                    line=number,
                )
            found[answer.key] = (answer, file, number)
    missing = [key for key in samples if key not in found]
    if missing and (not allow_missing or not found):
        raise DataError(
            f"{len(missing)} of {len(samples)} questions of {task.benchmark} ({task.split}) have no answer"
            f" (first: `{missing[0][0]}` {missing[0][1]}). {FORM} To score the others alone,"
            " as a PARTIAL result, add `allow_missing=true`.",
            path=path,
        )
    kept = tuple(sample for sample in task.samples if sample.key in found)
    if missing:
        task = dataclasses.replace(task, samples=kept, is_partial=True)
    answers = tuple(found[sample.key][0] for sample in kept)
    return SavedAnswers(task, answers, saved_identity(model or path.name, digest.hexdigest()))


def _files(path: Path) -> Sequence[Path]:
    if path.is_dir():
        files = sorted(path.glob(JOURNAL_PATTERN))
        if files:
            return files
        rule = f"this folder holds no {JOURNAL_PATTERN}"
    elif path.is_file():
        return [path]
    else:
        rule = "there is no such file or folder"
    raise ConfigError(
        f"`completions` is `{path}`, but {rule}. Give a JSONL file or the output folder of a run. {FORM}"
    )


def _lines(content: bytes, path: Path) -> list[tuple[int, Answer]]:
    found: list[tuple[int, Answer]] = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            found.append((number, parse_answer(raw.decode("utf-8-sig"))))
        except ValueError as error:
            raise DataError(f"{error}. {FORM}", path=path, line=number) from None
    return found


def _is_first_stage(earlier: Answer, later: Answer) -> bool:
    """Say whether a line only completes an earlier one, as the journal of a two-stage protocol has them."""
    return (
        earlier.choice_logprobs is None
        and later.choice_logprobs is not None
        and earlier.completion == later.completion is not None
    )


def _check_parts(answer: Answer, task: Task, path: Path, line: int) -> None:
    has_text, has_scores = answer.completion is not None, answer.choice_logprobs is not None
    needs = {GENERATE: ("completion", has_text), CHOICES: ("choice_logprobs", has_scores)}
    name, is_there = needs.get(task.kind, ("completion` or `choice_logprobs", has_text or has_scores))
    if not is_there and answer.stop_reason != "too_long":
        raise DataError(
            f"the field `{name}` is missing, which {task.protocol} reads. {FORM}", path=path, line=line
        )
    if answer.choice_logprobs is not None and len(answer.choice_logprobs) != len(task.choices):
        raise DataError(
            f"`choice_logprobs` has {len(answer.choice_logprobs)} values, but {task.protocol} compares"
            f" {len(task.choices)} choices ({', '.join(task.choices).strip()}). Give one value each.",
            path=path,
            line=line,
        )


def _unknown(answer: Answer, task: Task, path: Path, line: int) -> DataError:
    of_subject = [sample.index for sample in task.samples if sample.subject == answer.subject]
    if of_subject:
        why = (
            f"`index` is {answer.index}, but `{answer.subject}` has rows {min(of_subject)} to"
            f" {max(of_subject)} in the {task.split} split (of what is evaluated)."
        )
    else:
        subjects = list(dict.fromkeys(sample.subject for sample in task.samples))
        why = unknown_name("`subject`", answer.subject, subjects)
    return DataError(f"{why} {FORM}", path=path, line=line)
