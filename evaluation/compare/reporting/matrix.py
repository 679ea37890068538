"""A table of several runs, each against each: Markdown, LaTeX, JSON and a figure."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.compare.reporting.report import JSON_NAME, MARKDOWN_NAME, is_comparison
from evaluation.compare.reporting.table_files import write_tables
from evaluation.compare.reporting.tables import p_text
from evaluation.compare.statistics.pairwise import Difference, Pooled
from evaluation.metrics import Score, interval
from evaluation.reporting.figures import readable, readable_names, save_figure
from evaluation.reporting.tables import NOTHING, percent
from evaluation.running.run_files import LATEX_NAME
from evaluation.statistics.adjusted import holm
from evaluation.statistics.paired import ROUNDING
from glmtune.storage.checksums import json_with_checksum
from glmtune.storage.files import json_text
from glmtune.storage.journal import refuse_foreign_folder
from glmtune.tables import TextTable

if TYPE_CHECKING:
    from glmtune.terminal.console import Console

FIGURE_NAME = "differences.png"
LEVEL = 0.05
"""Of the star beside a difference, after Holm's correction."""
OVER_ALL = "all benchmarks"


@dataclass(frozen=True, slots=True)
class Shown:
    """One run of a table.

    Attributes:
        mark: a letter that stands for it in tables.
        model: who answered.
        place: folder or file.
        tool: that made the run.
    """

    mark: str
    model: str
    place: str
    tool: str


@dataclass(frozen=True)
class BenchmarkMatrix:
    """All pairs of runs on one benchmark.

    Attributes:
        title: benchmark and protocol.
        average: ``accuracy_micro`` or ``accuracy_macro``.
        scores: of each run.
        metrics: what the scores of each run are.
        pairs: places of two runs (the first smaller) to their difference.
        repeats: of each run that is the mean of several, their averages; empty for one.
    """

    title: str
    average: str
    scores: tuple[Score, ...]
    metrics: tuple[str, ...]
    pairs: Mapping[tuple[int, int], Difference]
    repeats: tuple[tuple[float, ...], ...] = ()

    @property
    def repeat_tests(self) -> dict[tuple[int, int], float]:
        """The two-sided p of each pair in which both sides have several runs, from the runs' averages alone.

        Questions are what they are here, and the runs (seeds) vary. Source: Welch 1947, "The generalization
        of Student's problem when several different population variances are involved".
        """
        return {
            pair: welch_p(*(self.repeats[place] for place in pair))
            for pair in self.pairs
            if self.repeats and all(len(self.repeats[place]) > 1 for place in pair)
        }


@dataclass(frozen=True)
class Matrix:
    """Several runs on one or several benchmarks.

    Attributes:
        runs: in the order in which they were named.
        benchmarks: by name.
        pooled: places of two runs to their difference over all benchmarks; empty for one benchmark.
        confidence: of all intervals.
        cluster: what questions were clustered by; None for nothing.
    """

    runs: tuple[Shown, ...]
    benchmarks: Mapping[str, BenchmarkMatrix]
    pooled: Mapping[tuple[int, int], Pooled]
    confidence: float
    cluster: str | None

    @property
    def title(self) -> str:
        """What is compared."""
        return f"{len(self.runs)} runs, each against each: {', '.join(self.benchmarks)}"


def matrix_tables(matrix: Matrix) -> list[TextTable]:
    """Return the tables: who is who, averages and pairs of every benchmark, and over all.

    Args:
        matrix: of several runs.
    """
    found = [_runs_table(matrix)]
    for name, each in matrix.benchmarks.items():
        found += [_square(matrix, name, each.pairs, each.scores), _pairs_table(matrix, name, each.pairs)]
        if (over_runs := _repeats_table(matrix, name, each)) is not None:
            found.append(over_runs)
    if matrix.pooled:
        means = {places: pooled.mean for places, pooled in matrix.pooled.items()}
        exact = {places: pooled.p_exact for places, pooled in matrix.pooled.items()}
        found += [_square(matrix, OVER_ALL, means, None), _pairs_table(matrix, OVER_ALL, means, exact)]
    return found


def _runs_table(matrix: Matrix) -> TextTable:
    names = list(matrix.benchmarks)
    rows = []
    for place, run in enumerate(matrix.runs):
        cells = []
        for name in names:
            score = matrix.benchmarks[name].scores[place]
            low, high = interval(score)
            repeats = matrix.benchmarks[name].repeats
            spread = (
                f", sd {100 * sd:.2f}" if repeats and (sd := deviation(repeats[place])) is not None else ""
            )
            within = f"({100 * low:.2f}–{100 * high:.2f})"
            cells.append(f"{percent(score.accuracy)} ± {percent(score.stderr)} {within}{spread}")
        metrics = ", ".join(dict.fromkeys(each.metrics[place] for each in matrix.benchmarks.values()))
        rows.append((run.mark, run.model, *cells, run.tool, metrics, run.place))
    heads = [
        f"{name}, {each.average.removeprefix('accuracy_')}, n = {each.scores[0].num_samples:,}, %"
        for name, each in matrix.benchmarks.items()
    ]
    columns = ("", "model", *heads, "made by", "score", "run")
    caption = "± one standard error, questions taken one by one; in brackets Wilson's 95 % interval."
    if any(repeats for each in matrix.benchmarks.values() for repeats in each.repeats):
        caption += " sd: standard deviation of the averages of several runs."
    return TextTable("Runs", columns, tuple(rows), caption, text_columns=("model", "made by", "score", "run"))


def _square(
    matrix: Matrix,
    name: str,
    pairs: Mapping[tuple[int, int], Difference],
    scores: Sequence[Score] | None,
) -> TextTable:
    marks = [run.mark for run in matrix.runs]
    rows = []
    for row, mark in enumerate(marks):
        cells = [_cell(pairs, row, column) for column in range(len(marks))]
        rows.append((mark, *([percent(scores[row].accuracy)] if scores else []), *cells))
    columns = ("", *(["score, %"] if scores else []), *marks)
    sure = f"{100 * matrix.confidence:g} %"
    caption = (
        f"Row minus column, points, with {sure} intervals that are not corrected; * differs at"
        f" {100 * LEVEL:g} % after Holm's correction over {_family(matrix, name)}."
    )
    return TextTable(f"Differences: {name}", columns, tuple(rows), caption)


def _family(matrix: Matrix, name: str) -> str:
    num_pairs = len(matrix.runs) * (len(matrix.runs) - 1) // 2
    if name == OVER_ALL or len(matrix.benchmarks) == 1:
        return "one pair" if num_pairs == 1 else f"the {num_pairs} pairs"
    num_tests = num_pairs * len(matrix.benchmarks)
    return f"the {num_pairs} pairs on all {len(matrix.benchmarks)} benchmarks ({num_tests} tests)"


def _cell(pairs: Mapping[tuple[int, int], Difference], row: int, column: int) -> str:
    if row == column:
        return NOTHING
    found = pairs[min(row, column), max(row, column)]
    sign = 1 if row < column else -1
    low, high = sorted((sign * found.low_pp, sign * found.high_pp))
    star = " *" if found.p_holm is not None and found.p_holm < LEVEL else ""
    return f"{_plus(sign * found.difference_pp)} ({_plus(low)} to {_plus(high)}){star}"


def _plus(value: float) -> str:
    return f"{value + 0.0:+.2f}"  # -0.0 becomes 0.0


def _pairs_table(
    matrix: Matrix,
    name: str,
    pairs: Mapping[tuple[int, int], Difference],
    exact: Mapping[tuple[int, int], float | None] | None = None,
) -> TextTable:
    rows = []
    for places, found in pairs.items():
        marks = [matrix.runs[place].mark for place in places]
        rows.append(
            (
                f"{marks[0]} − {marks[1]}",
                _plus(found.difference_pp),
                f"{_plus(found.low_pp)} to {_plus(found.high_pp)}",
                p_text(found.p_value),
                p_text(found.p_holm),
                *([p_text(exact[places])] if exact is not None else []),
                NOTHING if found.num_first is None else f"{found.num_first:,}",
                NOTHING if found.num_second is None else f"{found.num_second:,}",
                f"{found.num_questions:,}",
                NOTHING if found.num_clusters is None else f"{found.num_clusters:,}",
            )
        )
    columns = (
        "pair", "points", f"{100 * matrix.confidence:g} % interval", "p", "p Holm",
        *(["p exact"] if exact is not None else []), "first alone", "second alone", "n", "n clusters",
    )  # fmt: skip
    methods = "; ".join(dict.fromkeys(found.method for found in pairs.values()))
    caption = f"{methods}. First (second) alone: questions that only this run has right."
    if exact is not None:
        caption += " p exact: McNemar's test on the flips of all benchmarks, each a stratum."
    return TextTable(f"Pairs: {name}", columns, tuple(rows), caption)


def _repeats_table(matrix: Matrix, name: str, each: BenchmarkMatrix) -> TextTable | None:
    tests = each.repeat_tests
    if not tests:
        return None
    adjusted = dict(zip(tests, holm(list(tests.values())), strict=True))
    rows = []
    for pair, p_value in tests.items():
        marks = [matrix.runs[place].mark for place in pair]
        counts = [f"{len(each.repeats[place])}" for place in pair]
        rows.append(
            (
                f"{marks[0]} − {marks[1]}",
                _plus(each.pairs[pair].difference_pp),
                *(f"{100 * (deviation(each.repeats[place]) or 0):.2f}" for place in pair),
                " and ".join(counts),
                p_text(p_value),
                p_text(adjusted[pair]),
            )
        )
    columns = ("pair", "points", "sd first", "sd second", "n runs", "p", "p Holm")
    caption = (
        "Welch's t test of the averages of single runs (seeds): whether the difference is larger than that of"
        " training again. It knows nothing of the questions' spread, which the tables above are about."
    )
    return TextTable(f"Over runs: {name}", columns, tuple(rows), caption)


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation of some values; None below two.

    >>> deviation([0.25, 0.75]) == 0.125**0.5, deviation([0.5])
    (True, None)
    """
    return statistics.stdev(values) if len(values) > 1 else None


def welch_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the two-sided p of Welch's t test; values that do not vary at all are equal or are not.

    Args:
        first: at least two values.
        second: at least two values.
    """
    from scipy.stats import ttest_ind

    if max(deviation(first) or 0, deviation(second) or 0) < ROUNDING:
        return float(abs(statistics.fmean(first) - statistics.fmean(second)) < ROUNDING)
    found: Any = ttest_ind(first, second, equal_var=False)
    return float(found.pvalue)


def matrix_json(matrix: Matrix) -> dict[str, Any]:
    """Return the content of ``compare.json``: every figure, nothing that depends on the clock.

    Args:
        matrix: of several runs.
    """
    marks = [run.mark for run in matrix.runs]

    def named(places: tuple[int, int]) -> str:
        return " - ".join(marks[place] for place in places)

    return {
        "title": matrix.title,
        "runs": [dataclasses.asdict(run) for run in matrix.runs],
        "confidence": matrix.confidence,
        "cluster": matrix.cluster,
        "benchmarks": {
            name: {
                "title": each.title,
                "average": each.average,
                "scores": {
                    mark: {**dataclasses.asdict(score), "metric": metric}
                    for mark, score, metric in zip(marks, each.scores, each.metrics, strict=True)
                },
                "pairs": {named(places): dataclasses.asdict(pair) for places, pair in each.pairs.items()},
                "repeats": {
                    mark: list(values) for mark, values in zip(marks, each.repeats, strict=False) if values
                },
                "welch_p": {named(places): p_value for places, p_value in each.repeat_tests.items()},
            }
            for name, each in matrix.benchmarks.items()
        },
        "pooled": {named(places): dataclasses.asdict(each) for places, each in matrix.pooled.items()},
    }


def write_matrix(matrix: Matrix, folder: Path, *, paper: bool = False) -> list[Path]:
    """Write the table of several runs into a folder that holds nothing else.

    Args:
        matrix: of several runs.
        folder: made if it is not there.
        paper: also tables as LaTeX and the figure as SVG and PDF.

    Returns:
        The files, the most useful first.

    Raises:
        ConfigError: the folder holds something else.
        GlmtuneError: a file cannot be written.
    """
    refuse_foreign_folder(folder, is_comparison, result="comparison")
    folder.mkdir(parents=True, exist_ok=True)
    tables = matrix_tables(matrix)
    written = write_tables(
        folder,
        matrix.title,
        tables,
        json_text(json_with_checksum(matrix_json(matrix))),
        markdown=MARKDOWN_NAME,
        json=JSON_NAME,
        latex=LATEX_NAME if paper else None,
    )
    return [*written, *draw_matrix(matrix, folder / FIGURE_NAME, paper=paper)]


def show_matrix(matrix: Matrix, console: Console) -> None:
    """Print the tables.

    Args:
        matrix: of several runs.
        console: where to.
    """
    for table in matrix_tables(matrix):
        table.show(console)


def draw_matrix(matrix: Matrix, path: Path, *, paper: bool = False) -> list[Path]:
    """Write a figure: every pair's difference with its interval, benchmark by benchmark.

    Args:
        matrix: of several runs.
        path: the file.
        paper: also as SVG and PDF.

    Returns:
        The files.

    Raises:
        GlmtuneError: one cannot be written.
    """
    from matplotlib.figure import Figure

    shown: dict[str, Mapping[tuple[int, int], Difference]] = {
        name: each.pairs for name, each in matrix.benchmarks.items()
    }
    if matrix.pooled:
        shown[OVER_ALL] = {places: each.mean for places, each in matrix.pooled.items()}
    num_pairs = len(next(iter(shown.values())))
    height = 0.9 + 0.3 * num_pairs
    figure = Figure(figsize=(7, 0.6 + height * len(shown)), layout="constrained")
    rows = figure.subplots(len(shown), 1, squeeze=False, sharex=True)
    for (axes,), name, (_, pairs) in zip(rows, readable_names(shown), shown.items(), strict=True):
        marks = [" − ".join(matrix.runs[place].mark for place in places) for places in pairs]
        found = list(pairs.values())
        errors = [
            [max(0.0, each.difference_pp - each.low_pp) for each in found],
            [max(0.0, each.high_pp - each.difference_pp) for each in found],
        ]
        axes.errorbar(
            [each.difference_pp for each in found], range(len(found)), xerr=errors,
            fmt="o", color="#222222", capsize=3, markersize=4,
        )  # fmt: skip
        axes.axvline(0, color="#bbbbbb", linewidth=1)
        axes.set_yticks(range(len(found)), marks, fontsize=8)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_title(name, fontsize=10)
    rows[-1][0].set_xlabel(f"points, first minus second ({100 * matrix.confidence:g} % interval)")
    models = "   ".join(f"{run.mark}: {run.model}" for run in matrix.runs)
    figure.suptitle(readable(models), fontsize=8, wrap=True)
    return save_figure(figure, path, paper=paper)
