"""Tables of a comparison: the published form with intervals, the tests, categories, sensitivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.compare.pairing.match import Pair
from evaluation.compare.statistics.drops import Comparison, Drop
from evaluation.compare.statistics.gate import IN_WORDS, Verdict, worst
from evaluation.compare.statistics.perplexity import TextLoss
from evaluation.compare.statistics.sensitivity import Sensitivity, Spread
from evaluation.reporting.published import published_row
from evaluation.reporting.tables import NOTHING, percent
from glmtune.tables import TextTable


@dataclass(frozen=True)
class Compared:
    """One benchmark of a comparison.

    Attributes:
        pair: both runs, question by question.
        comparison: what the candidate lost.
        sensitivity: what moved besides.
    """

    pair: Pair
    comparison: Comparison
    sensitivity: Sensitivity


@dataclass(frozen=True)
class ComparisonReport:
    """Everything that the files of a comparison are made from.

    Attributes:
        labels: short names of baseline and candidate.
        benchmarks: by name.
        text_loss: perplexities, if a text was given.
    """

    labels: tuple[str, str]
    benchmarks: Mapping[str, Compared]
    text_loss: TextLoss | None = None

    @property
    def outcome(self) -> str:
        """The verdict over all benchmarks: the worst of theirs."""
        return worst(each.comparison.verdict.outcome for each in self.benchmarks.values())

    @property
    def measure(self) -> str:
        """What the averages are of, in words."""
        return " or ".join(dict.fromkeys(each.pair.measure for each in self.benchmarks.values()))

    @property
    def title(self) -> str:
        """Who is compared, marked where a run is a sample or a part."""
        titles = [each.pair.title for each in self.benchmarks.values()]
        marks = [mark for mark in ("SAMPLE", "PARTIAL") if any(mark in title.split() for title in titles)]
        names = [each.pair.baseline.model["name"] for each in self.benchmarks.values()]
        return " ".join([*marks, f"{self.labels[0]} → {self.labels[1]}: {names[0]}"])


def points(drop: Drop) -> str:
    """Write a drop with its interval."""
    return f"{drop.drop_pp:+.2f} ({drop.low_pp:+.2f} to {drop.high_pp:+.2f})"


def p_text(p_value: float | None) -> str:
    """Write a p-value.

    >>> p_text(0.0004), p_text(0.0312), p_text(None)
    ('< 0.001', '0.031', '–')
    """
    return NOTHING if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def main_table(report: ComparisonReport, confidence: float) -> TextTable:
    """Lay out the published form: a row per run, a column per benchmark; then drop, retention, verdict.

    Args:
        report: the comparison.
        confidence: of the intervals.
    """
    shown = list(report.benchmarks.values())
    rows: list[tuple[str, ...]] = []
    for place, label in enumerate(report.labels):
        scores = [(each.comparison.judged.baseline, each.comparison.judged.candidate) for each in shown]
        rows.append(
            (label, *(f"{percent(pair[place].accuracy)} ± {percent(pair[place].stderr)}" for pair in scores))
        )
    rows += _published_rows(report)
    rows += [
        ("drop, points", *(points(each.comparison.judged) for each in shown)),
        ("bounds, points", *(_bounds(each.comparison.verdict) for each in shown)),
        ("retention, %", *(_retention(each.comparison.judged) for each in shown)),
        ("verdict", *(IN_WORDS[each.comparison.verdict.outcome] for each in shown)),
    ]
    heads = [f"{each.pair.what}, {each.comparison.verdict.average}, %" for each in shown]
    sure = f"{100 * confidence:g} %"
    tests = dict.fromkeys(
        "t bound of grades" if each.pair.measure != "accuracy" else "score test" for each in shown
    )
    caption = (
        f"± one standard error; in brackets {sure} intervals of the paired bootstrap. Bounds: each alone"
        f" holds with {sure} confidence ({' or '.join(tests)}); the verdict rests on them, for they stay"
        " honest where few or no answers flipped and the bootstrap can only repeat what it saw."
    )
    return TextTable(report.measure.capitalize(), ("", *heads), tuple(rows), caption)


def _bounds(verdict: Verdict) -> str:
    return f"{verdict.lower_pp:+.2f} to {verdict.upper_pp:+.2f}"


def _published_rows(report: ComparisonReport) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for side, label in zip(("baseline", "candidate"), report.labels, strict=True):
        cells: list[str] = []
        for each in report.benchmarks.values():
            run = each.pair.baseline if side == "baseline" else each.pair.candidate
            row = None
            if each.pair.is_comparable:
                row = published_row(each.pair.benchmark, str(run.fingerprint["split"]), run.model)
            cells.append(NOTHING if row is None else f"{row.average:.2f}")
        if any(cell != NOTHING for cell in cells):
            found.append((f"{label}, published", *cells))
    return found


def _retention(drop: Drop) -> str:
    if drop.retention is None:
        return NOTHING
    return f"{percent(drop.retention)} ({percent(drop.retention_low)} to {percent(drop.retention_high)})"


def flips_table(report: ComparisonReport) -> TextTable:
    """Lay out the tests behind the verdicts.

    Args:
        report: the comparison.
    """
    columns = (
        "benchmark", "n", "lost", "gained", "micro drop", "macro drop", "McNemar p", "z paired", "z unpaired",
        "detectable drop",
    )  # fmt: skip
    rows = []
    for name, each in report.benchmarks.items():
        found = each.comparison
        rows.append(
            (
                name,
                f"{found.micro.num_samples:,}",
                f"{found.micro.num_lost:,}",
                f"{found.micro.num_gained:,}",
                points(found.micro),
                points(found.macro),
                p_text(found.micro.p_value),
                _number(found.paired_z),
                _number(found.unpaired_z),
                f"{found.min_detectable_pp:.2f}",
            )
        )
    caption = (
        "Lost: right in the baseline alone; gained: right in the candidate alone. Drops in points."
        " McNemar: exact, two-sided. Where answers have grades: lost and gained are graded lower and higher,"
        " the p is that of the paired t test, and bounds are one-sided t bounds. Unpaired: what the two"
        " averages would say by themselves. Detectable"
        " drop: the smallest true drop that so many questions would show, at a power of 80 %."
    )
    return TextTable("Tests on pairs", columns, tuple(rows), caption)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def group_table(title: str, drops: Mapping[str, Drop], what: str) -> TextTable:
    """Lay out drops per category or per subject.

    Args:
        title: above the table.
        drops: by name.
        what: heading of the names.
    """
    rows = tuple(
        (
            name,
            f"{drop.num_samples:,}",
            percent(drop.baseline.accuracy),
            percent(drop.candidate.accuracy),
            points(drop),
            f"{drop.num_lost} / {drop.num_gained}",
            p_text(drop.p_value),
            p_text(drop.p_holm),
        )
        for name, drop in drops.items()
    )
    columns = (what, "n", "before, %", "after, %", "drop, points", "lost / gained", "p", "p (Holm)")
    return TextTable(title, columns, rows)


def sensitivity_tables(report: ComparisonReport) -> list[TextTable]:
    """Lay out what moved besides accuracy: probabilities, then texts; only what the protocols have.

    Args:
        report: the comparison.
    """
    found: list[TextTable] = []
    shifts = {name: each.sensitivity.choices for name, each in report.benchmarks.items()}
    rows = [
        (
            name,
            f"{shift.num_samples:,}",
            _spread(shift.js_nats),
            _spread(shift.kl_nats),
            f"{shift.num_changed:,}",
            f"{shift.mean_margin_baseline:.3f}",
            f"{shift.mean_margin_candidate:.3f}",
        )
        for name, shift in shifts.items()
        if shift is not None
    ]
    if rows:
        columns = (
            "benchmark", "n", "JS mean / p95, nats", "KL mean / p95, nats", "choice changed", "margin before",
            "margin after",
        )  # fmt: skip
        caption = "Margin: best minus second-best probability of a choice, mean over the questions."
        found.append(TextTable("Shift of the choice probabilities", columns, tuple(rows), caption))
    # The same place in the other kind of protocol: generated texts have no choice probabilities.
    texts = {name: each.sensitivity.texts for name, each in report.benchmarks.items()}
    rows = [
        (
            name,
            f"{shift.num_samples:,}",
            f"{shift.num_identical:,}",
            f"{shift.num_same_answer:,}",
            _quartiles((shift.first_quartile_chars, shift.median_chars, shift.third_quartile_chars)),
            NOTHING if shift.median_length_chars is None else f"{shift.median_length_chars:.0f}",
        )
        for name, shift in texts.items()
        if shift is not None
    ]
    if rows:
        columns = (
            "benchmark", "n", "identical", "other text, same answer", "parts at character (quartiles)",
            "median length",
        )  # fmt: skip
        found.append(TextTable("Where greedy texts part", columns, tuple(rows)))
    return found


def margin_table(name: str, each: Compared) -> TextTable | None:
    """Lay out flips by the baseline's margin, None without choice probabilities.

    Args:
        name: of the benchmark.
        each: its comparison.
    """
    shift = each.sensitivity.choices
    if shift is None:
        return None
    rows = tuple(
        (
            f"{each.low:.1f}–{each.high:.1f}",
            f"{each.num_samples:,}",
            f"{each.num_candidate:,}",
            f"{each.num_changed:,}",
            f"{each.num_lost:,}",
            f"{each.num_gained:,}",
        )
        for each in shift.margins
    )
    columns = ("margin", "n before", "n after", "choice changed", "lost", "gained")
    return TextTable(f"Flips by margin: {name}", columns, rows)


def text_loss_table(loss: TextLoss, labels: tuple[str, str]) -> TextTable:
    """Lay out the perplexities.

    Args:
        loss: of both models on one text.
        labels: their short names.
    """
    change = f"{loss.change_nats:+.4f}"
    if loss.low_nats is not None and loss.high_nats is not None:
        change += f" ({loss.low_nats:+.4f} to {loss.high_nats:+.4f})"
    return TextTable(
        "Perplexity",
        ("text", "tokens", labels[0], labels[1], "change, nats per token"),
        ((loss.path, f"{loss.num_tokens:,}", f"{loss.baseline:.3f}", f"{loss.candidate:.3f}", change),),
    )


def difference_table(differing: Sequence[tuple[str, str, str]], labels: tuple[str, str]) -> TextTable:
    """Lay out what the two models differ in.

    Args:
        differing: name, value of the baseline, value of the candidate.
        labels: their short names.
    """
    return TextTable("What differs", ("", *labels), tuple(differing))


def _spread(spread: Spread) -> str:
    return f"{spread.mean:.4f} / {spread.p95:.4f}"


def _quartiles(values: Sequence[float | None]) -> str:
    return (
        NOTHING if values[0] is None else " / ".join(f"{value:.0f}" for value in values if value is not None)
    )
