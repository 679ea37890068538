"""The file that C-Eval's server scores: a letter for every question of the test split."""

from __future__ import annotations

from collections.abc import Mapping

from evaluation.reporting.results import Result
from evaluation.sample import LETTERS
from glmtune.errors import DataError

NUM_SUBJECTS = 52


def submission(result: Result) -> dict[str, dict[str, str]]:
    """Return the submission of a run over C-Eval's test split.

    A question without an extracted answer gets an empty text, which scores nothing: no letter is made up.

    Args:
        result: of the run.

    Returns:
        Subject to row id to letter.

    Raises:
        DataError: subjects or rows are not those of the whole split; see ``check_submission``.
    """
    letters: dict[str, dict[str, str]] = {}
    rows: dict[str, set[str]] = {}
    for judgement in result.judgements:
        sample = judgement.sample
        # The server names rows by the `id` column, which need not be the place in the file.
        row_id = sample.row_id or str(sample.index)
        letters.setdefault(sample.subject, {})[row_id] = judgement.extracted.get(result.rule) or ""
        rows.setdefault(sample.subject, set()).add(row_id)
    check_submission(letters, rows)
    return letters


def check_submission(letters: Mapping[str, Mapping[str, str]], rows: Mapping[str, set[str]]) -> None:
    """Check a submission as the server would: 52 subjects, every row, one of the four letters (or nothing).

    Args:
        letters: subject to row id to letter.
        rows: the row ids that each subject must have.

    Raises:
        DataError: what is wrong first.
    """
    if len(letters) != NUM_SUBJECTS:
        raise DataError(
            f"the submission has {len(letters)} subjects, but C-Eval's server wants all {NUM_SUBJECTS}. Leave"
            " `benchmark.subjects` and `benchmark.limit` out."
        )
    for subject, answers in letters.items():
        if set(answers) != rows.get(subject):
            raise DataError(
                f"the submission has {len(answers)} rows of `{subject}`, but the test split has"
                f" {len(rows.get(subject, ()))}. Leave `benchmark.subjects` and `benchmark.limit` out."
            )
        wrong = {row: letter for row, letter in answers.items() if letter and letter not in LETTERS}
        if wrong:
            row, letter = next(iter(wrong.items()))
            raise DataError(
                f"the submission answers `{subject}` {row} with `{letter}`, but only {', '.join(LETTERS)} are"
                " letters of an option. Use a protocol that gives letters."
            )
