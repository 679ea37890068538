"""What is shown and written once all rows are answered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glmtune.files import json_text, write_text_atomically
from glmtune.inference.predict.predictions import Prediction
from glmtune.metrics.significance import Difference
from glmtune.tables import named_values

if TYPE_CHECKING:
    from rich.table import Table

COMPARISON_NAME = "comparison.json"
SHOWN_SAMPLES = 3
"""Rows printed in full: enough to see whether answers make sense, few enough to stay on a screen."""


def samples_table(predictions: Sequence[Prediction], before: Sequence[Prediction] | None = None) -> Table:
    """Lay out some rows in full, spread evenly over the data.

    Args:
        predictions: all rows.
        before: the same rows answered without the prefix, if they were.
    """
    shown: list[tuple[str, str]] = []
    num_shown = min(SHOWN_SAMPLES, len(predictions))
    for number in range(num_shown):
        place = number * len(predictions) // num_shown
        row = predictions[place]
        parts = [("prompt", row.prompt), ("reference", row.reference)]
        if before is not None:
            parts.append(("before", before[place].prediction))
        parts.append(("prediction" if before is None else "after", row.prediction))
        shown += [(f"{row.row} {name}", text.strip()) for name, text in parts if text is not None]
        shown.append(("", ""))  # a blank line between rows
    return named_values(shown[:-1], title="samples")


def write_comparison(
    folder: Path, differences: Sequence[Difference], *, a: str, b: str, num_rows: int, test: str
) -> Path:
    """Write a paired comparison as ``comparison.json``.

    Args:
        folder: where to.
        differences: one per metric.
        a: the first run.
        b: the second run.
        num_rows: rows that both answered.
        test: how the differences were tested.

    Returns:
        The file.
    """
    values = {
        "a": a,
        "b": b,
        "num_rows": num_rows,
        "test": test,
        "differences": [difference.to_json() for difference in differences],
    }
    path = folder / COMPARISON_NAME
    write_text_atomically(path, json_text(values))
    return path
