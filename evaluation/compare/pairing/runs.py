"""Finished runs read back from their folders.

From files and not from memory, also where `glmtune compare` has just evaluated both sides: a comparison of
two folders and one of two models then take the same way and cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.answer import Answer, parse_answer
from evaluation.metrics import Outcome
from evaluation.reporting.files import ANSWERS_NAME, RESULTS_NAME, read_results
from evaluation.running.run_folder import IDENTITY_NAME, JOURNAL_PATTERN, read_journals
from glmtune.errors import ConfigError, DataError

STATES = ("correct", "wrong", "unparsed")
AGAIN = "Run the same `glmtune eval` again (answers that exist are not asked again)."


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """One judged answer, as a line of a run's ``answers.jsonl`` has it.

    Attributes:
        answer: what the model gave; ``extracted`` holds what each rule read.
        gold: the right answer.
        status: ``correct``, ``wrong`` or ``unparsed`` under the deciding rule.
    """

    answer: Answer
    gold: str
    status: str

    @property
    def outcome(self) -> Outcome:
        """The row, ready to be averaged."""
        return Outcome(
            self.answer.subject,
            self.answer.index,
            is_correct=self.status == "correct",
            is_unparsed=self.status == "unparsed",
            is_truncated=self.answer.stop_reason == "length",
        )


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
    num_asked = json.loads((folder / IDENTITY_NAME).read_text(encoding="utf-8")).get("num_samples", "its")
    num_done = len(read_journals(folder))
    return DataError(
        f"this run is not finished: {num_done} of {num_asked} questions have an answer, and {RESULTS_NAME} is"
        " missing. Run the same `glmtune eval` again, it goes on where it stopped; then compare.",
        path=folder,
    )


def _read_rows(path: Path) -> list[JudgedAnswer]:
    try:
        # Not `splitlines`: a JSON string may hold U+2028, U+2029 or U+0085 as it is, and they end no line.
        lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise DataError(f"it cannot be read ({error.strerror}). {AGAIN}", path=path) from None
    rows: list[JudgedAnswer] = []
    first_seen: dict[tuple[str, int], int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            answer = parse_answer(line)
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
        if answer.key in first_seen:
            raise DataError(
                f"`{answer.subject}` {answer.index} is there a second time (first in line"
                f" {first_seen[answer.key]}), and pairs need every question once. {AGAIN}",
                path=path,
                line=number,
            )
        first_seen[answer.key] = number
        rows.append(JudgedAnswer(answer, gold, status))
    return rows


def _check_whole(rows: list[JudgedAnswer], results: Mapping[str, Any], path: Path) -> None:
    """Refuse answers that are not those the results were counted from (a file edited or replaced since)."""
    num_samples = int(results["num_samples"])
    if len(rows) != num_samples:
        raise DataError(
            f"it has {len(rows)} answers, but {RESULTS_NAME} beside it counts {num_samples}. {AGAIN}",
            path=path,
        )
    num_right = sum(row.status == "correct" for row in rows)
    expected = round(results["accuracy_micro"] * num_samples)
    if num_right != expected:
        raise DataError(
            f"{num_right} of its answers are right, but {RESULTS_NAME} beside it counts {expected}. {AGAIN}",
            path=path,
        )


def _seconds(folder: Path) -> float | None:
    """Add up what the journals say about time."""
    total = 0.0
    for path in folder.glob(JOURNAL_PATTERN):
        for line in path.read_bytes().splitlines():
            try:
                total += parse_answer(line.decode("utf-8")).seconds
            except ValueError:
                continue  # the half line of a killed run, whose question was asked again
    return total or None
