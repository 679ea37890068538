"""Charts of a comparison: paired bars with intervals, flips by margin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.compare.reporting.tables import ComparisonReport
from evaluation.compare.statistics.drops import Drop
from evaluation.reporting.chart import error_bars
from evaluation.reporting.figures import readable, readable_names, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#4477aa", "#ee6677")
NEUTRAL = "#bbbbbb"
BAR_WIDTH = 0.38


def draw_bars(report: ComparisonReport, confidence: float, path: Path, *, paper: bool = False) -> list[Path]:
    """Write accuracies side by side with their 95 % intervals, and the drops with theirs below.

    Args:
        report: the comparison.
        confidence: of the drops' intervals.
        path: the file.
        paper: also as SVG and PDF.

    Returns:
        The files.

    Raises:
        GlmtuneError: one cannot be written.
    """
    from matplotlib.figure import Figure

    bars = _bars(report)
    figure = Figure(figsize=(max(6.0, 2.5 + 0.75 * len(bars)), 6.5), layout="constrained")
    # One above the other on the same places: a drop of a point is invisible beside accuracies.
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    places = list(range(len(bars)))
    for side, label in enumerate(report.labels):
        scores = [(drop.baseline, drop.candidate)[side] for drop in bars.values()]
        above.bar(
            [place + (side - 0.5) * BAR_WIDTH for place in places],
            [100 * score.accuracy for score in scores],
            BAR_WIDTH,
            yerr=error_bars(scores),
            color=COLORS[side],
            label=readable(label),
            error_kw={"ecolor": "#222222", "capsize": 2, "linewidth": 0.8},
        )
    above.set_ylabel(f"{report.measure}, % (95 % interval)")
    above.set_ylim(0, 100)
    above.legend(fontsize=8)
    above.set_title(readable(report.title), fontsize=10, wrap=True)
    _draw_drops(below, list(bars.values()), confidence)
    verdict = next(iter(report.benchmarks.values())).comparison.verdict
    below.axhline(verdict.max_drop_pp, color=COLORS[1], linestyle="--", linewidth=1, label="tolerance")
    below.legend(fontsize=8)
    below.set_xticks(places, readable_names(bars), rotation=30, ha="right", fontsize=8)
    return save_figure(figure, path, paper=paper)


def _bars(report: ComparisonReport) -> dict[str, Drop]:
    """Return each benchmark's judged average, then its categories."""
    found: dict[str, Drop] = {}
    for name, each in report.benchmarks.items():
        found[f"{name} {each.comparison.verdict.average}"] = each.comparison.judged
        found |= {f"{name}: {title}": drop for title, drop in each.comparison.categories.items()}
    return found


def _draw_drops(axes: Axes, drops: list[Drop], confidence: float) -> None:
    values = [drop.drop_pp for drop in drops]
    errors = [
        [max(0.0, drop.drop_pp - drop.low_pp) for drop in drops],
        [max(0.0, drop.high_pp - drop.drop_pp) for drop in drops],
    ]
    axes.errorbar(range(len(drops)), values, yerr=errors, fmt="o", color="#222222", capsize=3, markersize=4)
    axes.axhline(0, color=NEUTRAL, linewidth=1)
    axes.set_ylabel(f"drop, points ({100 * confidence:g} % interval)")


def draw_margins(report: ComparisonReport, path: Path, *, paper: bool = False) -> list[Path]:
    """Write, per benchmark, how many questions lie at each margin and which of them flipped.

    Args:
        report: a comparison with choice probabilities.
        path: the file.
        paper: also as SVG and PDF.

    Returns:
        The files.

    Raises:
        GlmtuneError: one cannot be written.
    """
    from matplotlib.figure import Figure

    shifts = {
        name: each.sensitivity.choices
        for name, each in report.benchmarks.items()
        if each.sensitivity.choices is not None
    }
    labels = [readable(label) for label in report.labels]
    figure = Figure(figsize=(7, 0.6 + 2.8 * len(shifts)), layout="constrained")
    rows = figure.subplots(len(shifts), 1, squeeze=False)
    for (name, shift), (axes,) in zip(shifts.items(), rows, strict=True):
        lows = [each.low for each in shift.margins]
        width = shift.margins[0].high - shift.margins[0].low
        counts = [each.num_samples for each in shift.margins]
        after = [each.num_candidate for each in shift.margins]
        axes.bar(lows, counts, width, align="edge", color=NEUTRAL, label=f"questions, {labels[0]}")
        axes.stairs(after, [*lows, shift.margins[-1].high], color="#222222", label=labels[1])
        twin = axes.twinx()
        for part, color in (("num_lost", COLORS[1]), ("num_gained", COLORS[0])):
            shares = [
                100 * getattr(each, part) / each.num_samples if each.num_samples else 0.0
                for each in shift.margins
            ]
            centers = [low + width / 2 for low in lows]
            twin.plot(centers, shares, "o-", color=color, markersize=4, label=part.removeprefix("num_"))
        twin.set_ylabel("flipped, % of those questions")
        twin.set_ylim(0, max(5.0, 1.1 * twin.get_ylim()[1]))
        axes.set_title(f"{readable(name)}: flips by margin of {labels[0]}", fontsize=10)
        axes.set_xlabel("margin: best minus second-best probability")
        axes.set_ylabel("questions")
        handles = [axes.get_legend_handles_labels(), twin.get_legend_handles_labels()]
        axes.legend(handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], fontsize=7)
    return save_figure(figure, path, paper=paper)
