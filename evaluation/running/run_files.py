"""The files of an evaluation's folder by name, and which of a folder's files are ours."""

from __future__ import annotations

import re
from pathlib import Path

from glmtune.storage.journal import DAMAGED_SUFFIX, read_identity

IDENTITY_NAME = "run.json"
JOURNAL_PATTERN = "journal-rank*.jsonl"
FAILED_PATTERN = "failed-rank*.jsonl"
RESULTS_NAME = "results.json"
TIMING_NAME = "timing.json"
ANSWERS_NAME = "answers.jsonl"
REPORT_NAME = "report.md"
CHART_NAME = "chart.png"
MISTAKES_NAME = "mistakes.html"
SUBMISSION_NAME = "submission.json"
LATEX_NAME = "tables.tex"
ONE_ANSWER = "answer-{}"
"""Folder of each of several answers to all questions, by its number from 1."""
EARLIER = "earlier"
"""Folder, with a number, that keeps what ``resume=false`` found: a flag shall not delete hours of work."""

_NAMES = (
    IDENTITY_NAME, RESULTS_NAME, TIMING_NAME, ANSWERS_NAME, REPORT_NAME, CHART_NAME, MISTAKES_NAME,
    SUBMISSION_NAME, LATEX_NAME,
)  # fmt: skip
_FINGERPRINT = ("data_hash", "model")
"""Keys by which a file of such a name is known to be ours: other tools have a `run.json`, too."""


def is_evaluation(folder: Path) -> bool:
    """Say whether a folder holds an evaluation of ours, begun, finished or set aside.

    Raises:
        DataError: a file that tells cannot be read.
    """
    if any(folder.glob(JOURNAL_PATTERN)) or any(map(_is_earlier, folder.iterdir())):
        return True
    for name in (IDENTITY_NAME, RESULTS_NAME):
        try:
            values = read_identity(folder / name) or {}
        except ValueError:  # damaged, so that nobody knows: what may be another's is not touched
            continue
        values = values.get("fingerprint", values)
        if isinstance(values, dict) and all(key in values for key in _FINGERPRINT):
            return True
    return False


def holds_evaluations(folder: Path) -> bool:
    """Say whether a folder is that of an evaluation, or holds folders of some: answers, steps.

    Raises:
        DataError: a file that tells cannot be read.
    """
    return is_evaluation(folder) or any(path.is_dir() and is_evaluation(path) for path in folder.iterdir())


def files_of_run(folder: Path) -> list[Path]:
    """Return the files of a run that are there; what users put beside them is not among them."""
    patterns = (JOURNAL_PATTERN, JOURNAL_PATTERN + DAMAGED_SUFFIX, FAILED_PATTERN)
    journals = [path for pattern in patterns for path in folder.glob(pattern)]
    return sorted([*journals, *(path for name in _NAMES if (path := folder / name).is_file())])


def _is_earlier(path: Path) -> bool:
    return path.is_dir() and re.fullmatch(rf"{EARLIER}-\d+", path.name) is not None
