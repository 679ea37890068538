"""Scores as tables for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from glmtune.metrics.significance import Difference
from glmtune.metrics.summary import TextReport
from glmtune.metrics.text import METRICS

if TYPE_CHECKING:
    from rich.table import Table


def report_table(report: TextReport, title: str) -> Table:
    """Lay out the scores of one file: a row per metric with its interval and definition.

    Args:
        report: the scores.
        title: what was scored.
    """
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=_counts(report), caption_justify="left")
    table.add_column("metric")
    table.add_column("score", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("definition", overflow="fold")
    for name, estimate in zip(METRICS, report.estimates, strict=True):
        metric = METRICS[name]
        interval = f"{estimate.low:.2f} to {estimate.high:.2f}"
        definition = metric.protocol or metric.describe().replace("|", " ")
        table.add_row(name, f"{estimate.value:.2f}", interval, definition)
    return table


def comparison_table(differences: Sequence[Difference], *, a: str, b: str, num_rows: int) -> Table:
    """Lay out the paired comparison of two runs: a row per metric.

    Args:
        differences: one per metric.
        a: name of the first run.
        b: name of the second.
        num_rows: rows that both answered.
    """
    from rich.table import Table

    title = f"{a} → {b}: {num_rows} paired rows, paired bootstrap"
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for heading in (a, b, "change", "95 % interval", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    for item in differences:
        p_value = "< 0.001" if item.p_value < 0.001 else f"{item.p_value:.3f}"
        verdict = "better" if item.change > 0 else "worse"
        table.add_row(
            item.metric,
            f"{item.a:.2f}",
            f"{item.b:.2f}",
            f"{item.change:+.2f}",
            f"{item.low:+.2f} … {item.high:+.2f}",
            p_value,
            verdict if item.is_significant else "–",
        )
    return table


def _counts(report: TextReport) -> str:
    words = [f"{report.num_rows} rows"]
    if report.num_empty_predictions:
        words.append(f"{report.num_empty_predictions} empty predictions (scored 0)")
    if report.num_empty_references:
        words.append(f"{report.num_empty_references} empty references (scored 0)")
    return ", ".join(words)
