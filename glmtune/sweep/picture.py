"""The picture of a sweep: a panel for every setting, what each of its values scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glmtune.storage.files import write_atomically, write_error
from glmtune.sweep.metrics import Metric
from glmtune.sweep.space import short_names
from glmtune.sweep.statistics import PointResult, Ranking

PICTURE_FILE = "sweep.png"
MAX_COLUMNS = 3
LOG_RATIO = 20.0
"""Values of one sign that span so much more than themselves are shown by their ratios."""
SHOWN_CHARS = 18
MAX_TICKS = 7
"""Of so many values each is named."""
COLOURS = {"other": "#8899aa", "candidate": "#4477aa", "best": "#cc3311"}
NAMES = {"best": "best mean", "candidate": "may be the best", "other": "other points; small: seeds"}


def draw_sweep(ranking: Ranking, metric: Metric, path: Path) -> None:
    """Draw every seed as a dot and every point's mean over its values, the best one marked.

    Args:
        ranking: all points.
        metric: the height.
        path: the PNG to write.

    Raises:
        GlmtuneError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [result for result in ranking.results if result.by_seed]
    keys = [key for key, _ in ranking.results[0].point.values]
    columns = min(MAX_COLUMNS, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(0.8 + 3.6 * columns, 3.2 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for place, name in enumerate(short_names(keys)):
        _panel(panels[place], shown, place, name)
        if place % columns == 0:
            way = "higher" if metric.is_larger_better else "lower"
            panels[place].set_ylabel(f"{metric.name} ({way} is better)")
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    _explain(figure, panels[0], shown)
    heights = [value for result in shown for value in result.by_seed.values()]
    if heights and _is_wide(heights):
        panels[0].set_yscale("log")  # one learning rate that diverges would flatten all others
    # No date and no version of matplotlib inside: the same figures make the same bytes.
    options: dict[str, Any] = {"format": "png", "metadata": {"Software": "glmtune"}}
    try:
        write_atomically(path, lambda partial: figure.savefig(partial, **options))
    except OSError as error:
        raise write_error(path, error) from None


def _panel(axes: Any, results: Sequence[PointResult], place: int, name: str) -> None:
    """Draw one setting."""
    texts = [result.point.values[place][1] for result in results]
    numbers = [_number(text) for text in texts]
    known = [number for number in numbers if number is not None]
    if len(known) == len(texts):
        places = known
        if known and _is_wide(known):
            axes.set_xscale("log")
        if len(set(known)) <= MAX_TICKS:
            axes.minorticks_off()
            axes.set_xticks(sorted(set(known)), [f"{number:g}" for number in sorted(set(known))])
    else:
        names = sorted(set(texts))
        places = [float(names.index(text)) for text in texts]
        axes.set_xticks(range(len(names)), [_ascii(text) for text in names], rotation=20, ha="right")
    for number, (result, x) in reversed(list(enumerate(zip(results, places, strict=True)))):
        kind = _kind(number, result)
        values = list(result.by_seed.values())
        axes.plot([x] * len(values), values, ".", color=COLOURS[kind], markersize=3, alpha=0.6)
        axes.plot([x], [result.mean], "D" if kind == "best" else "o", color=COLOURS[kind], markersize=6)
    axes.margins(x=0.15)
    axes.set_xlabel(name)
    axes.grid(alpha=0.3)


def _kind(number: int, result: PointResult) -> str:
    return "best" if number == 0 else "candidate" if result.may_be_best else "other"


def _explain(figure: Any, axes: Any, results: Sequence[PointResult]) -> None:
    """Say what the colours are of those that are there."""
    there = {_kind(number, result) for number, result in enumerate(results)}
    marks = [
        axes.plot([], [], "D" if kind == "best" else "o", color=COLOURS[kind], label=name)[0]
        for kind, name in NAMES.items()
        if kind in there
    ]
    if marks:
        figure.legend(handles=marks, loc="outside upper right", ncols=len(marks), fontsize=8, frameon=False)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= LOG_RATIO


def _ascii(text: str) -> str:
    """Show what a font without Chinese has, so that nothing turns into boxes."""
    plain = text.encode("ascii", "backslashreplace").decode()
    return plain if len(plain) <= SHOWN_CHARS else f"{plain[:SHOWN_CHARS]}..."
