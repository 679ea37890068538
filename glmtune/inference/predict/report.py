"""What is shown and written once all rows are answered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glmtune.inference.predict.predictions import Prediction
from glmtune.metrics.significance import Difference
from glmtune.storage.files import json_text, write_text_atomically
from glmtune.tables import named_values

if TYPE_CHECKING:
    from rich.table import Table

COMPARISON_NAME = "comparison.json"
SHOWN_SAMPLES = 3
"""Rows printed in full: enough to see whether answers make sense, few enough to stay on a screen."""


def samples_table(predictions: Sequence[Prediction]) -> Table:
    """Lay out some rows in full, spread evenly over the data.

    Args:
        predictions: all rows.
    """
    shown: list[tuple[str, str]] = []
    for place in _shown_places(len(predictions)):
        row = predictions[place]
        parts = [("prompt", row.prompt), ("reference", row.reference), ("thoughts", row.thoughts or None)]
        parts.append(("prediction", row.prediction))
        shown += [(f"{row.row} {name}", text.strip()) for name, text in parts if text is not None]
        shown.append(("", ""))  # a blank line between rows
    return named_values(shown[:-1], title="samples")


def before_and_after(before: Sequence[Prediction], after: Sequence[Prediction]) -> Table:
    """Lay out some rows, spread evenly over the data, as the base and the tuned model answered them.

    Args:
        before: all rows, answered without the prefix or adapter.
        after: the same rows, answered with it.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from glmtune.terminal.console import plain

    columns = ("prompt", "before", "after")
    table = Table(title="samples", title_justify="left", box=SIMPLE_HEAD, show_lines=True)
    has_references = any(row.reference is not None for row in after)
    for heading in (*columns, *["reference"] * has_references):
        table.add_column(heading, overflow="fold", ratio=1)
    for place in _shown_places(len(after)):
        row = after[place]
        # The frame around a question is the same in all rows, and a column is narrow.
        prompt = f"{row.row}: {' '.join(row.prompt.split())}"
        cells = [prompt, before[place].prediction, row.prediction]
        table.add_row(*(plain(text.strip()) for text in (*cells, *[row.reference or ""] * has_references)))
    return table


def switch_line(predictions: Sequence[Prediction]) -> str:
    """Word how often a switch decided for the base; empty where there was none.

    Args:
        predictions: all rows.
    """
    decided = [row.is_tuned for row in predictions if row.is_tuned is not None]
    if not decided:
        return ""
    return f"switch: off for {decided.count(False)} of {len(decided)} prompts, which the base answered"


def _shown_places(num_rows: int) -> list[int]:
    num_shown = min(SHOWN_SAMPLES, num_rows)
    return [number * num_rows // num_shown for number in range(num_shown)]


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
