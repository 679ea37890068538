"""Put two files of predictions side by side: only rows that asked the same question may be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glmtune.errors import DataError
from glmtune.inference.predict.predictions import Prediction, identity_beside
from glmtune.metrics.text import RowScores, score_row

SHOWN_ROWS = 5
"""Row numbers named in an error."""


def score_predictions(predictions: Sequence[Prediction], path: Path) -> list[RowScores]:
    """Score every row anew from its texts.

    Args:
        predictions: rows of one file.
        path: the file, for the message.

    Raises:
        DataError: a row has no reference to compare with.
    """
    without = [prediction.row for prediction in predictions if prediction.reference is None]
    if without:
        raise DataError(
            f"{len(without)} of {len(predictions)} rows have no reference (first: row {without[0]}), so there"
            " is nothing to score them against. Predict on data with answers, or remove these rows.",
            path=path,
        )
    return [score_row(prediction.prediction, prediction.reference or "") for prediction in predictions]


def match_rows(a: Sequence[Prediction], b: Sequence[Prediction], path_a: Path, path_b: Path) -> None:
    """Refuse two files that do not answer the same questions.

    Args:
        a: rows of the first file, in row order.
        b: rows of the second, in row order.
        path_a: the first file.
        path_b: the second file.

    Raises:
        DataError: the data sets, the rows or the references differ; with the first differences.
    """
    known = [(identity_beside(path) or {}).get("data_fingerprint") for path in (path_a, path_b)]
    if all(known) and known[0] != known[1]:
        raise DataError(
            f"the two runs answered different data: its data fingerprint is {_short(known[0])}, that of"
            f" {path_b} is {_short(known[1])}. Predict both on the same file and rows.",
            path=path_a,
        )
    rows_a, rows_b = {row.row: row for row in a}, {row.row: row for row in b}
    only = [sorted(rows_a.keys() - rows_b.keys()), sorted(rows_b.keys() - rows_a.keys())]
    if any(only):
        parts = [
            f"{len(rows)} rows are only in {path} ({_first(rows)})"
            for rows, path in zip(only, (path_a, path_b), strict=True)
            if rows
        ]
        raise DataError(
            f"the two runs do not answer the same rows: {'; '.join(parts)}. Finish both runs"
            " (`glmtune predict` goes on where it stopped), with the same `data.max_predict_samples`.",
            path=path_a,
        )
    differing = [row for row, mine in rows_a.items() if mine.reference != rows_b[row].reference]
    if differing:
        first = differing[0]
        texts = [_excerpt(rows[first].reference) for rows in (rows_a, rows_b)]
        raise DataError(
            f"the references differ from those of {path_b} in {len(differing)} of {len(a)} rows"
            f" ({_first(sorted(differing))}); row {first}: {texts[0]} against {texts[1]}. Only runs on the"
            " same data, with the same tokenizer and `data.max_target_length`, can be compared.",
            path=path_a,
        )


def _first(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:SHOWN_ROWS]))
    return f"rows {shown}{', ...' if len(rows) > SHOWN_ROWS else ''}"


def _short(fingerprint: object) -> str:
    return str(fingerprint)[:12]


def _excerpt(text: str | None) -> str:
    shown = str(text)
    return f"`{shown if len(shown) <= 40 else shown[:40] + '...'}`"
