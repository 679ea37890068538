"""Finished runs read back from their folders.

From files and not from memory, also where `glmtune compare` has just evaluated both sides: a comparison of
two folders and one of two models then take the same way and cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.answer import Answer, parse_answer
from evaluation.metrics import Outcome
from evaluation.reporting.files import AGAIN, ANSWERS_CHECKSUM, read_results
from evaluation.running.run_files import ANSWERS_NAME, IDENTITY_NAME, JOURNAL_PATTERN, RESULTS_NAME
from evaluation.running.run_folder import read_journals
from glmtune.errors import ConfigError, DataError
from glmtune.storage.checksums import file_checksum
from glmtune.storage.journal import read_identity, read_journal

GRADED = "graded"
STATES = ("correct", "wrong", "unparsed", GRADED)
ROUNDING = 1e-6
"""Of a mean of scores, which is a sum of floats."""


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """One judged answer, as a line of a run's ``answers.jsonl`` has it.

    Attributes:
        answer: what the model gave; ``extracted`` holds what each rule read.
        gold: the right answer.
        status: ``correct``, ``wrong``, ``unparsed`` or ``graded`` under the deciding rule; of several answers
            that of their vote.
        score: from 0 to 1 where the rule grades, or a question has several answers; None: right or wrong.
    """

    answer: Answer
    gold: str
    status: str
    score: float | None = None

    @property
    def value(self) -> float:
        """The score, else 1 for right and 0 for wrong."""
        return float(self.status == "correct") if self.score is None else self.score

    @property
    def outcome(self) -> Outcome:
        """The row, ready to be averaged."""
        return Outcome(
            self.answer.subject,
            self.answer.index,
            is_correct=self.status == "correct",
            is_unparsed=self.status == "unparsed",
            is_truncated=self.answer.stop_reason == "length",
            score=self.score,
            cluster=self.cluster,
        )

    @property
    def cluster(self) -> str:
        """What the question shares with others beside the subject; empty where nothing is named."""
        return str(self.answer.extra.get("cluster", ""))


@dataclass(frozen=True)
class Run:
    """A finished run of one benchmark, as its folder holds it.

    Attributes:
        folder: where it is.
        results: content of its ``results.json``.
        rows: one per question, in the order of the data.
        num_seconds: that answering took, over all processes and restarts; None where no journal says.
    """

    folder: Path
    results: Mapping[str, Any]
    rows: tuple[JudgedAnswer, ...]
    num_seconds: float | None

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What was asked, and of whom."""
        return self.results["fingerprint"]

    @property
    def model(self) -> Mapping[str, Any]:
        """Identity of the model."""
        return self.fingerprint["model"]

    @property
    def rule(self) -> str:
        """The rule of extraction that decided."""
        return str(self.results["rule"])

    @property
    def is_sampled(self) -> bool:
        """Whether every question has several answers, and its score is the share that is right."""
        return "num_answers" in self.results

    def extracted(self, row: JudgedAnswer) -> str | None:
        """Return the answer that the deciding rule read."""
        return row.answer.extracted.get(self.rule)


def find_runs(folder: Path) -> dict[str, Run]:
    """Read a run, or all runs of a folder that holds several (``benchmark=all output_dir=...``).

    Args:
        folder: of one run, or of one folder per benchmark.

    Returns:
        Benchmark to its run.

    Raises:
        ConfigError: there is no run.
        DataError: a run is unfinished, damaged or without gold answers.
    """
    names = (RESULTS_NAME, IDENTITY_NAME)
    inside = sorted({path.parent for name in names for path in folder.glob(f"*/{name}")})
    if any((folder / name).is_file() for name in names):
        inside = [folder]
    if not inside:
        what = "holds no run" if folder.is_dir() else "does not exist"
        raise ConfigError(
            f"`runs` names `{folder}`, but this folder {what}. Give output folders of `glmtune eval`"
            f" (they hold {RESULTS_NAME} and {ANSWERS_NAME})."
        )
    runs = [read_run(each) for each in inside]
    found = {str(run.results["benchmark"]): run for run in runs}
    if len(found) < len(runs):
        raise ConfigError(
            f"`runs` names `{folder}`, which holds several runs of one benchmark:"
            f" {', '.join(str(run.folder) for run in runs)}. Name one of them."
        )
    return found


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Args:
        folder: the output folder of an evaluation.

    Raises:
        DataError: it is unfinished; rows are missing, doubled or changed; it has no gold answers.
    """
    if not (folder / RESULTS_NAME).is_file():
        raise _unfinished(folder)
    results = read_results(folder / RESULTS_NAME)
    if results.get("accuracy_micro") is None:
        raise DataError(
            f"{results['title']} has no gold answers, so there is no accuracy to compare. Compare runs of a"
            " labelled split, such as `benchmark.split=val`.",
            path=folder / RESULTS_NAME,
        )
    path = folder / ANSWERS_NAME
    rows = _read_rows(path)
    _check_whole(rows, results, path)
    return Run(folder, results, tuple(rows), _seconds(folder))


def _unfinished(folder: Path) -> DataError:
    try:
        num_asked = (read_identity(folder / IDENTITY_NAME) or {}).get("num_samples", "its")
    except ValueError as error:
        raise DataError(f"it is no valid JSON ({error}). {AGAIN}", path=folder / IDENTITY_NAME) from None
    num_done = len(read_journals(folder))
    return DataError(
        f"this run is not finished: {num_done} of {num_asked} questions have an answer, and {RESULTS_NAME} is"
        " missing. Run the same `glmtune eval` again, it goes on where it stopped; then compare.",
        path=folder,
    )


def _read_rows(path: Path) -> list[JudgedAnswer]:
    try:
        # Not `splitlines`: a JSON string may hold U+2028, U+2029 or U+0085 as it is, and they end no line.
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    except OSError as error:
        raise DataError(f"it cannot be read ({error.strerror or error}). {AGAIN}", path=path) from None
    rows: list[JudgedAnswer] = []
    first_seen: dict[tuple[str, int], int] = {}
    num_choices: set[int] = set()
    for number, line in enumerate(lines, start=1):
        try:
            answer = parse_answer(line.decode("utf-8"))
        except ValueError as error:
            raise DataError(f"{error}. {AGAIN}", path=path, line=number) from None
        status, gold = answer.extra.get("status"), answer.extra.get("gold")
        if status not in STATES or not isinstance(gold, str):
            raise DataError(
                f"`status` is {status!r} and `gold` {gold!r}, but they must be one of {', '.join(STATES)} and"
                f" the right answer. {AGAIN}",
                path=path,
                line=number,
            )
        score = _score(answer, status, path, number)
        if not isinstance(answer.extra.get("cluster", ""), str):
            raise DataError(f"`cluster` is no text. {AGAIN}", path=path, line=number)
        if answer.key in first_seen:
            raise DataError(
                f"`{answer.subject}` {answer.index} is there a second time (first in line"
                f" {first_seen[answer.key]}), and pairs need every question once. {AGAIN}",
                path=path,
                line=number,
            )
        num_choices.add(len(answer.choice_logprobs or ()))
        if len(num_choices - {0}) > 1:
            raise DataError(
                f"`choice_logprobs` has {len(answer.choice_logprobs or ())} values, but the lines before it"
                f" have another number. {AGAIN}",
                path=path,
                line=number,
            )
        first_seen[answer.key] = number
        rows.append(JudgedAnswer(answer, gold, status, score))
    return rows


def _score(answer: Answer, status: str, path: Path, line: int) -> float | None:
    """Return the score of a row; None where it is one answer that is right or wrong."""
    score: object = answer.extra.get("score")
    if score is None and status != GRADED:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise DataError(
            f"`score` is {score!r}, but that of a `{status}` answer is a number from 0 to 1. {AGAIN}",
            path=path,
            line=line,
        )
    return float(score)


def _check_whole(rows: list[JudgedAnswer], results: Mapping[str, Any], path: Path) -> None:
    """Refuse answers that are not those the results were counted from (a file edited or replaced since)."""
    num_samples = results["num_samples"]
    # A user's own subjects are in none of the official figures, unless there are no others.
    own = results.get("own_subjects") or []
    rows = [row for row in rows if row.answer.subject not in own] or rows
    if len(rows) != num_samples:
        raise DataError(
            f"it has {len(rows)} answers, but {RESULTS_NAME} beside it counts {num_samples}. {AGAIN}",
            path=path,
        )
    num_right = sum(row.value for row in rows)
    expected = results["accuracy_micro"] * num_samples
    if abs(num_right - expected) > ROUNDING * num_samples:
        scored = any(row.score is not None for row in rows)
        what = f"its scores add up to {num_right:g}" if scored else f"{num_right:g} of its answers are right"
        raise DataError(
            f"{what}, but {RESULTS_NAME} beside it counts {expected:g}. {AGAIN}",
            path=path,
        )
    # What the counts do not show: an answer that is another and as right, a probability.
    if results.get(ANSWERS_CHECKSUM) and file_checksum(path) != results[ANSWERS_CHECKSUM]:
        raise DataError(
            f"its content is not that which {RESULTS_NAME} beside it was counted from: damaged, or edited by"
            f" hand. {AGAIN}",
            path=path,
        )


def _seconds(folder: Path) -> float | None:
    """Add up what the journals say about time; None where one of them is absent in part."""
    contents = [read_journal(path, parse_answer) for path in folder.glob(JOURNAL_PATTERN)]
    if any(content.damaged or content.num_torn for content in contents):
        return None
    return sum(answer.seconds for content in contents for answer in content.entries) or None
