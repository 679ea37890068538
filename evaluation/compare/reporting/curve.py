"""A curve over the checkpoints of a training run: accuracy with its interval, what has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.compare.reporting.table_files import write_tables
from evaluation.compare.reporting.tables import p_text
from evaluation.compare.statistics.pairwise import Difference
from evaluation.metrics import Score, interval
from evaluation.reporting.chart import error_bars
from evaluation.reporting.figures import readable, readable_names, save_figure
from evaluation.reporting.tables import NOTHING, percent
from evaluation.running.run_files import LATEX_NAME, holds_evaluations
from glmtune.storage.checksums import checked_json, json_with_checksum
from glmtune.storage.files import json_text
from glmtune.storage.journal import refuse_foreign_folder
from glmtune.tables import TextTable

if TYPE_CHECKING:
    from glmtune.terminal.console import Console

JSON_NAME, MARKDOWN_NAME, FIGURE_NAME = "curve.json", "curve.md", "curve.png"
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Point:
    """One step of a curve.

    Attributes:
        step: of the training; 0 is the base.
        score: the average that the benchmark publishes.
        change: this step minus the first of the curve, on the same questions; None for the first itself.
        folder: of the evaluation.
    """

    step: int
    score: Score
    change: Difference | None
    folder: str


@dataclass(frozen=True)
class Curve:
    """The checkpoints of a run on one benchmark.

    Attributes:
        title: benchmark and protocol.
        average: ``accuracy_micro`` or ``accuracy_macro``.
        points: in the order of their steps.
        measure: what the averages are of, as a column is called.
    """

    title: str
    average: str
    points: tuple[Point, ...]
    measure: str = "accuracy, %"


def curve_table(name: str, curve: Curve) -> TextTable:
    """Lay out one curve.

    Args:
        name: of the benchmark.
        curve: at least one step.
    """
    rows: list[tuple[str, ...]] = []
    for point in curve.points:
        low, high = interval(point.score)
        change = point.change
        # `+ 0.0` below turns minus zero, which rounding leaves behind, into a plain one.
        rows.append(
            (
                f"{point.step:,}" if point.step else "base",
                f"{point.score.num_samples:,}",
                f"{percent(point.score.accuracy)} ± {percent(point.score.stderr)}",
                f"{100 * low:.2f}–{100 * high:.2f}",
                NOTHING if change is None else f"{change.difference_pp + 0.0:+.2f}",
                NOTHING if change is None else f"{change.low_pp:+.2f} to {change.high_pp:+.2f}",
                NOTHING if change is None else p_text(change.p_value),
                NOTHING if change is None else p_text(change.p_holm),
            )
        )
    first = curve.points[0].step
    since = f"since {'base' if not first else f'step {first:,}'}, points"
    sure = f"{100 * CONFIDENCE:g} % interval"
    columns = ("step", "n", curve.measure, sure, since, f"{sure} of it", "p", "p Holm")
    methods = dict.fromkeys(point.change.method for point in curve.points if point.change is not None)
    average = curve.average.removeprefix("accuracy_").capitalize()
    caption = f"{average} average, ± one standard error, Wilson's interval."
    if methods:
        num_tests = len(curve.points) - 1
        caption += (
            f" Changes are paired: {'; '.join(methods)}; Holm's correction over {num_tests}"
            f" {'test' if num_tests == 1 else 'tests'}. Whoever takes the best of these steps has chosen it"
            " by these questions: its accuracy here is then too high, ask others."
        )
    return TextTable(f"{name}: {curve.title}", columns, tuple(rows), caption)


def is_curve(folder: Path) -> bool:
    """Say whether a folder holds a curve of ours, or the evaluations of one that has begun."""
    try:
        values = checked_json((folder / JSON_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Written when all steps are evaluated: one that was stopped before has their folders alone.
        inside = [path for path in folder.iterdir() if path.is_dir()]
        return bool(inside) and any(holds_evaluations(path) for path in inside)
    return {"run", "benchmarks"} <= values.keys()


def write_curves(run: str, curves: Mapping[str, Curve], folder: Path, *, paper: bool = False) -> list[Path]:
    """Write curves as Markdown, JSON and a figure.

    Args:
        run: the training run.
        curves: by benchmark.
        folder: made if it is not there; the evaluations of the steps may be in it.
        paper: also tables as LaTeX and the figure as SVG and PDF.

    Returns:
        The files, the most useful first.

    Raises:
        ConfigError: the folder holds something else.
        GlmtuneError: a file cannot be written.
    """
    refuse_foreign_folder(folder, is_curve, result="curve")
    folder.mkdir(parents=True, exist_ok=True)
    tables = [curve_table(name, curve) for name, curve in curves.items()]
    written = write_tables(
        folder,
        f"Checkpoints of {run}",
        tables,
        json_text(json_with_checksum(curves_json(run, curves))),
        markdown=MARKDOWN_NAME,
        json=JSON_NAME,
        latex=LATEX_NAME if paper else None,
    )
    return [*written, *draw_curves(run, curves, folder / FIGURE_NAME, paper=paper)]


def curves_json(run: str, curves: Mapping[str, Curve]) -> dict[str, Any]:
    """Return the content of ``curve.json``.

    Args:
        run: the training run.
        curves: by benchmark.
    """
    return {
        "run": run,
        "confidence": CONFIDENCE,
        "benchmarks": {name: dataclasses.asdict(curve) for name, curve in curves.items()},
    }


def show_curves(curves: Mapping[str, Curve], console: Console) -> None:
    """Print the tables.

    Args:
        curves: by benchmark.
        console: where to.
    """
    for name, curve in curves.items():
        curve_table(name, curve).show(console)


def draw_curves(run: str, curves: Mapping[str, Curve], path: Path, *, paper: bool = False) -> list[Path]:
    """Write a figure: accuracy over steps, a line per benchmark, with 95 % intervals.

    Args:
        run: the training run.
        curves: by benchmark.
        path: the file.
        paper: also as SVG and PDF.

    Returns:
        The files.

    Raises:
        GlmtuneError: one cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in zip(readable_names(curves), curves.values(), strict=True):
        scores: Sequence[Score] = [point.score for point in curve.points]
        axes.errorbar(
            [point.step for point in curve.points],
            [100 * score.accuracy for score in scores],
            yerr=error_bars(scores),
            fmt="o-",
            capsize=3,
            markersize=4,
            linewidth=1.2,
            label=f"{name}, n = {scores[0].num_samples:,}",
        )
    axes.set_xlabel("step (0: base)")
    measures = " or ".join(dict.fromkeys(curve.measure for curve in curves.values()))
    axes.set_ylabel(f"{measures} (95 % interval)")
    axes.set_title(readable(f"Checkpoints of {run}"), fontsize=10, wrap=True)
    axes.legend(fontsize=8)
    return save_figure(figure, path, paper=paper)
