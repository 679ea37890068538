"""The table of methods: several candidates against one baseline, ranked by drop, size and speed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.compare.pairing.runs import Run
from evaluation.compare.reporting.charts import COLORS, NEUTRAL
from evaluation.compare.reporting.table_files import write_tables
from evaluation.compare.reporting.tables import ComparisonReport, points
from evaluation.compare.statistics.gate import EXIT_CODES, IN_WORDS, worst
from evaluation.reporting.figures import readable, save_figure
from evaluation.reporting.tables import NOTHING
from evaluation.statistics.adjusted import holm
from glmtune.storage.files import json_text
from glmtune.tables import TextTable

METHODS_NAME = "methods"
PARETO_NAME = "pareto.png"
LEVEL = 0.05
"""Of the star beside a drop, after Holm's correction over the table."""
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Cost:
    """What a model costs to hold and to run.

    Attributes:
        weight_bytes: memory of its weights.
        questions_per_second: over all benchmarks, one process; None where no journal tells.
    """

    weight_bytes: int
    questions_per_second: float | None


@dataclass(frozen=True)
class MethodResult:
    """One candidate of the table.

    Attributes:
        name: as in ``candidates``.
        cost: its size and speed.
        report: its comparison with the baseline.
        p_holm: benchmark to the p-value of McNemar's test, corrected for the whole table.
    """

    name: str
    cost: Cost
    report: ComparisonReport
    p_holm: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def drop_pp(self) -> float:
        """Mean of the judged drops over the benchmarks."""
        drops = [each.comparison.judged.drop_pp for each in self.report.benchmarks.values()]
        return sum(drops) / len(drops)

    @property
    def half_width_pp(self) -> float:
        """Half the interval of that mean."""
        # The benchmarks' questions are independent of each other: variances add, so half widths add in
        # squares.
        halves = [
            (each.comparison.judged.high_pp - each.comparison.judged.low_pp) / 2
            for each in self.report.benchmarks.values()
        ]
        return math.hypot(*halves) / len(halves)

    @property
    def js_nats(self) -> float | None:
        """Mean shift of the choice probabilities over the benchmarks that have them."""
        shifts = [each.sensitivity.choices for each in self.report.benchmarks.values()]
        means = [shift.js_nats.mean for shift in shifts if shift is not None]
        return sum(means) / len(means) if means else None


@dataclass(frozen=True)
class MethodTable:
    """All candidates, the smallest drop first.

    Attributes:
        label: short name of the baseline.
        cost: of the baseline.
        methods: the candidates.
    """

    label: str
    cost: Cost
    methods: tuple[MethodResult, ...]

    @property
    def outcome(self) -> str:
        """The verdict over all candidates: the worst of theirs."""
        return worst(each.report.outcome for each in self.methods)

    @property
    def front(self) -> frozenset[str]:
        """The Pareto front: candidates that no other beats in size or drop without losing in the other."""
        return frozenset(
            each.name
            for each in self.methods
            if not any(_beats(other, each) for other in self.methods if other is not each)
        )


def _beats(one: MethodResult, other: MethodResult) -> bool:
    mine = (one.cost.weight_bytes, one.drop_pp)
    theirs = (other.cost.weight_bytes, other.drop_pp)
    return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]


def cost_of(runs: Sequence[Run], weight_bytes: int) -> Cost:
    """Return size and speed of a model that answered some benchmarks.

    Args:
        runs: its runs.
        weight_bytes: memory of its weights.
    """
    # Of the journals, not of `timing.json`: they count the answers of every process and every restart.
    seconds = [run.num_seconds for run in runs]
    total = sum(each for each in seconds if each is not None)
    count = sum(len(run.rows) for run in runs)
    return Cost(weight_bytes, None if None in seconds or not total else count / total)


def rank_methods(label: str, cost: Cost, methods: Sequence[MethodResult]) -> MethodTable:
    """Sort candidates by their drop, and correct the p-values of the whole table.

    Args:
        label: short name of the baseline.
        cost: of the baseline.
        methods: at least one candidate.
    """
    keys = [(place, name) for place, each in enumerate(methods) for name in each.report.benchmarks]
    p_values = [methods[place].report.benchmarks[name].comparison.micro.p_value for place, name in keys]
    # One family: every cell of the table is a chance of a false alarm.
    corrected = dict(zip(keys, holm(p_values), strict=True))
    done = [
        dataclasses.replace(each, p_holm={name: corrected[place, name] for name in each.report.benchmarks})
        for place, each in enumerate(methods)
    ]
    return MethodTable(label, cost, tuple(sorted(done, key=lambda each: each.drop_pp)))


def method_table(table: MethodTable) -> TextTable:
    """Lay out the ranking.

    Args:
        table: of the candidates.
    """
    names = list(table.methods[0].report.benchmarks)
    by_size = sorted(table.methods, key=lambda each: each.cost.weight_bytes)
    by_speed = sorted(table.methods, key=lambda each: -(each.cost.questions_per_second or 0.0))
    rows = [
        (f"{table.label} (baseline)", *_cost_cells(table.cost, table.cost), *([NOTHING] * (len(names) + 4)))
    ]
    for place, each in enumerate(table.methods, start=1):
        ranks = (place, by_size.index(each) + 1, by_speed.index(each) + 1)
        rows.append(
            (
                f"{each.name} ●" if each.name in table.front else each.name,
                *_cost_cells(each.cost, table.cost),
                *(_drop_cell(each, name) for name in names),
                f"{each.drop_pp:+.2f} ± {each.half_width_pp:.2f}",
                NOTHING if each.js_nats is None else f"{each.js_nats:.4f}",
                " / ".join(map(str, ranks)),
                IN_WORDS[each.report.outcome],
            )
        )
    columns = (
        "", "weights, MB", "of baseline, %", "questions/s", *(f"{name} drop" for name in names),
        "mean drop", "JS, nats", "rank: drop / size / speed", "verdict",
    )  # fmt: skip
    caption = (
        "Sorted by the mean drop (points). ●: no other method is both smaller and better. *: flips differ"
        " from chance after Holm's correction over this table. Methods whose intervals overlap are not told"
        " apart by it: compare two of them directly. Speed is that of the run, as its journal has it."
    )
    return TextTable("Methods", columns, tuple(rows), caption)


def _cost_cells(cost: Cost, baseline: Cost) -> tuple[str, str, str]:
    speed = cost.questions_per_second
    return (
        f"{cost.weight_bytes / MEGABYTE:,.1f}",
        f"{100 * cost.weight_bytes / baseline.weight_bytes:.1f}",
        NOTHING if speed is None else f"{speed:.2f}",
    )


def _drop_cell(each: MethodResult, name: str) -> str:
    star = " *" if each.p_holm[name] < LEVEL else ""
    return points(each.report.benchmarks[name].comparison.judged) + star


def methods_json(table: MethodTable) -> dict[str, Any]:
    """Return the content of ``methods.json``.

    Args:
        table: of the candidates.
    """
    return {
        "outcome": table.outcome,
        "exit_code": EXIT_CODES[table.outcome],
        "baseline": {"label": table.label, **dataclasses.asdict(table.cost)},
        "methods": {
            each.name: {
                **dataclasses.asdict(each.cost),
                "outcome": each.report.outcome,
                "mean_drop_pp": each.drop_pp,
                "mean_drop_half_width_pp": each.half_width_pp,
                "mean_js_nats": each.js_nats,
                "is_on_front": each.name in table.front,
                "p_holm": dict(each.p_holm),
                "drops_pp": {
                    name: found.comparison.judged.drop_pp for name, found in each.report.benchmarks.items()
                },
            }
            for each in table.methods
        },
    }


def write_methods(table: MethodTable, title: str, folder: Path, *, paper: bool = False) -> list[Path]:
    """Write the table and its plot.

    Args:
        table: of the candidates.
        title: above the table.
        folder: made if it is not there.
        paper: also the table as LaTeX and the plot as SVG and PDF.

    Returns:
        The files.

    Raises:
        GlmtuneError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = write_tables(
        folder,
        title,
        [method_table(table)],
        json_text(methods_json(table)),
        markdown=f"{METHODS_NAME}.md",
        json=f"{METHODS_NAME}.json",
        latex=f"{METHODS_NAME}.tex" if paper else None,
    )
    return [*written, *draw_pareto(table, title, folder / PARETO_NAME, paper=paper)]


def draw_pareto(table: MethodTable, title: str, path: Path, *, paper: bool = False) -> list[Path]:
    """Write size against drop; the area of a point is its speed, the dashed line the Pareto front.

    Args:
        table: of the candidates.
        title: above the plot.
        path: the file.
        paper: also as SVG and PDF.

    Returns:
        The files.

    Raises:
        GlmtuneError: one cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    speeds = [each.cost.questions_per_second or 0.0 for each in table.methods]
    fastest = max([*speeds, table.cost.questions_per_second or 0.0]) or 1.0
    for each, speed in zip(table.methods, speeds, strict=True):
        place = (each.cost.weight_bytes / MEGABYTE, each.drop_pp)
        color = COLORS[0] if each.name in table.front else NEUTRAL
        axes.errorbar(*place, yerr=each.half_width_pp, color=color, capsize=3, linewidth=1)
        axes.scatter(*place, s=30 + 170 * speed / fastest, color=color, zorder=3)
        axes.annotate(readable(each.name), place, xytext=(7, 5), textcoords="offset points", fontsize=8)
    baseline = (table.cost.weight_bytes / MEGABYTE, 0.0)
    axes.scatter(*baseline, s=30 + 170 * (table.cost.questions_per_second or 0.0) / fastest, color=COLORS[1])
    axes.annotate(readable(table.label), baseline, xytext=(7, 5), textcoords="offset points", fontsize=8)
    front = sorted((each for each in table.methods if each.name in table.front), key=_size)
    axes.plot([_size(each) for each in front], [each.drop_pp for each in front], "--", color=COLORS[0])
    axes.axhline(0, color=NEUTRAL, linewidth=1)
    axes.set_xlabel("weights, MB")
    axes.set_ylabel("mean drop, points (interval)")
    axes.set_title(f"{readable(title)}\narea of a point: questions per second", fontsize=10, wrap=True)
    return save_figure(figure, path, paper=paper)


def _size(each: MethodResult) -> float:
    return each.cost.weight_bytes / MEGABYTE
