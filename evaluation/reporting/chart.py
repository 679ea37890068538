"""A chart of a result: accuracy per category (or subject) with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.metrics import Score, interval
from evaluation.reporting.figures import readable, readable_names, save_figure
from evaluation.reporting.results import Result


def draw_chart(result: Result, path: Path, *, paper: bool = False) -> list[Path]:
    """Write a PNG with a bar per category, or per subject where there are no categories.

    Args:
        result: of a labelled split.
        path: the file.
        paper: also as SVG and PDF.

    Returns:
        The files.

    Raises:
        GlmtuneError: one cannot be written.
    """
    from matplotlib.figure import Figure

    bars = _bars(result)
    names, scores = readable_names(bars), list(bars.values())
    figure = Figure(figsize=(8, 1.4 + 0.36 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    values = [100 * score.accuracy for score in scores]
    axes.barh(
        names, values, xerr=error_bars(scores), color="#4477aa", error_kw={"ecolor": "#222222", "capsize": 3}
    )
    for place, (value, score) in enumerate(zip(values, scores, strict=True)):
        axes.text(99, place, f"{value:.1f} % of {score.num_samples:,}", va="center", ha="right", fontsize=8)
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.set_xlabel(f"{'mean grade' if result.is_graded else 'accuracy'}, % (95 % interval)")
    axes.set_title(readable(result.title), fontsize=10, wrap=True)
    return save_figure(figure, path, paper=paper)


def error_bars(scores: Sequence[Score]) -> list[list[float]]:
    """Return how far the 95 % intervals reach below and above each accuracy, in points."""
    ends = [interval(score) for score in scores]
    return [
        [max(0.0, 100 * (score.accuracy - low)) for score, (low, _) in zip(scores, ends, strict=True)],
        [max(0.0, 100 * (high - score.accuracy)) for score, (_, high) in zip(scores, ends, strict=True)],
    ]


def _bars(result: Result) -> Mapping[str, Score]:
    summary = result.summary
    parts = summary.categories or summary.subjects
    return {**parts, "average": summary.micro if summary.headline == "accuracy_micro" else summary.macro}
