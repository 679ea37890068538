"""Scores as tables for people to read."""

from __future__ import annotations

from collections.abc import Sequence

from glmtune.metrics.significance import Difference
from glmtune.metrics.summary import TextReport
from glmtune.metrics.text import METRICS
from glmtune.tables import TextTable


def report_table(report: TextReport, title: str) -> TextTable:
    """Lay out the scores of one file: a row per metric with its interval and definition.

    Args:
        report: the scores.
        title: what was scored.
    """
    rows: list[tuple[str, ...]] = []
    for name, estimate in zip(METRICS, report.estimates, strict=True):
        metric = METRICS[name]
        interval = f"{estimate.low:.2f} to {estimate.high:.2f}"
        definition = metric.protocol or metric.describe().replace("|", " ")
        rows.append((name, f"{estimate.value:.2f}", interval, definition))
    columns = ("metric", "score", "95 % interval", "definition")
    return TextTable(title, columns, tuple(rows), _counts(report), text_columns=("definition",))


def comparison_table(differences: Sequence[Difference], *, a: str, b: str, num_rows: int) -> TextTable:
    """Lay out the paired comparison of two runs: a row per metric.

    Args:
        differences: one per metric.
        a: name of the first run.
        b: name of the second.
        num_rows: rows that both answered.
    """
    rows: list[tuple[str, ...]] = []
    for item in differences:
        p_value = "< 0.001" if item.p_value < 0.001 else f"{item.p_value:.3f}"
        verdict = "better" if item.change > 0 else "worse"
        rows.append(
            (
                item.metric,
                f"{item.a:.2f}",
                f"{item.b:.2f}",
                f"{item.change:+.2f}",
                f"{item.low:+.2f} … {item.high:+.2f}",
                p_value,
                verdict if item.is_significant else "–",
            )
        )
    title = f"{a} → {b}: {num_rows} paired rows, paired bootstrap"
    columns = ("metric", a, b, "change", "95 % interval", "p", "verdict")
    return TextTable(title, columns, tuple(rows), text_columns=("verdict",))


def _counts(report: TextReport) -> str:
    words = [f"{report.num_rows} rows"]
    if report.num_empty_predictions:
        words.append(f"{report.num_empty_predictions} empty predictions (scored 0)")
    if report.num_empty_references:
        words.append(f"{report.num_empty_references} empty references (scored 0)")
    return ", ".join(words)
