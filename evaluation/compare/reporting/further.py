"""What a comparison of two runs says beside its verdict: errors by clusters, and all benchmarks together."""

from __future__ import annotations

import dataclasses
from typing import Any

from evaluation.compare.reporting.tables import Compared, ComparisonReport, p_text
from evaluation.compare.statistics.pairwise import Difference, Pooled, corrected, difference_of, pool
from evaluation.metrics import Outcome
from evaluation.reporting.tables import NOTHING
from evaluation.statistics.clustered import CLUSTER, FEW_CLUSTERS, SUBJECT
from glmtune.tables import TextTable


def _outcomes(each: Compared) -> tuple[list[Outcome], list[Outcome]]:
    # Subjects that a user has added are in no published average; they count where there is nothing else.
    own = each.pair.baseline.results.get("own_subjects") or []
    rows = [rows for rows in each.pair.rows if rows[0].answer.subject not in own] or list(each.pair.rows)
    return [before.outcome for before, _ in rows], [after.outcome for _, after in rows]


def _average(each: Compared) -> str:
    return f"accuracy_{each.comparison.verdict.average}"


def clustered_drops(each: Compared, confidence: float) -> dict[str, Difference]:
    """Return the judged drop with errors by every way to cluster the questions: by subject, by cluster.

    Args:
        each: one benchmark of a comparison.
        confidence: of the two-sided intervals.
    """
    before, after = _outcomes(each)
    ways = {SUBJECT: {row.subject for row in before}, CLUSTER: {row.cluster for row in before}}
    return {
        way: difference_of(before, after, _average(each), confidence=confidence, cluster=way)
        for way, names in ways.items()
        if len(names) > 1 and all(names)
    }


def clustered_table(report: ComparisonReport, confidence: float) -> TextTable | None:
    """Lay out drops with errors by clusters.

    Args:
        report: the comparison.
        confidence: of the two-sided intervals.

    Returns:
        None where no questions hang together.
    """
    rows: list[tuple[str, ...]] = []
    is_few = False
    for name, each in report.benchmarks.items():
        for way, found in clustered_drops(each, confidence).items():
            is_few = is_few or (found.num_clusters or 0) < FEW_CLUSTERS
            rows.append(
                (
                    f"{name}, {each.comparison.verdict.average}",
                    way,
                    f"{found.num_questions:,}",
                    f"{found.num_clusters:,}",
                    f"{found.difference_pp:+.2f}",
                    f"{found.stderr_pp:.2f}",
                    f"{found.low_pp:+.2f} to {found.high_pp:+.2f}",
                    p_text(found.p_value),
                )
            )
    if not rows:
        return None
    columns = (
        "benchmark", "clusters", "n", "n clusters", "drop, points", "± s.e.",
        f"{100 * confidence:g} % interval", "p",
    )  # fmt: skip
    caption = "Paired differences clustered by Miller 2024, eq. 4; Student's t over clusters."
    if is_few:
        caption += f" Below {FEW_CLUSTERS} clusters such an error is uncertain itself."
    return TextTable("Clustered drops", columns, tuple(rows), caption, text_columns=("clusters",))


def over_benchmarks(report: ComparisonReport, confidence: float) -> tuple[dict[str, Difference], Pooled]:
    """Return every benchmark's judged drop, corrected for their number, and what they say together.

    Args:
        report: of at least two benchmarks.
        confidence: of the two-sided intervals.

    Returns:
        Benchmark to its difference, and the one over all.
    """
    found = [
        difference_of(*_outcomes(each), _average(each), confidence=confidence)
        for each in report.benchmarks.values()
    ]
    return dict(zip(report.benchmarks, corrected(found), strict=True)), pool(found, confidence=confidence)


def benchmarks_table(report: ComparisonReport, confidence: float) -> TextTable | None:
    """Lay out the tests of all benchmarks, corrected for their number, and the tests over all.

    Args:
        report: the comparison.
        confidence: of the two-sided intervals.

    Returns:
        None for a single benchmark.
    """
    if len(report.benchmarks) < 2:
        return None
    each, pooled = over_benchmarks(report, confidence)
    shown = {**each, f"mean of {len(each)} benchmarks": pooled.mean}
    rows = [
        (
            name,
            f"{found.num_questions:,}",
            f"{found.difference_pp:+.2f}",
            f"{found.low_pp:+.2f} to {found.high_pp:+.2f}",
            NOTHING if found.num_first is None else f"{found.num_first:,}",
            NOTHING if found.num_second is None else f"{found.num_second:,}",
            p_text(found.p_value),
            p_text(found.p_holm),
        )
        for name, found in shown.items()
    ]
    columns = (
        "benchmark", "n", "drop, points", f"{100 * confidence:g} % interval", "lost", "gained", "p",
        f"p Holm, {len(each)} tests",
    )  # fmt: skip
    methods = "; ".join(dict.fromkeys(found.method for found in shown.values()))
    caption = (
        f"{methods}. Flips of all benchmarks together, each a stratum: McNemar's exact"
        f" p {p_text(pooled.p_exact)}. Intervals are not corrected."
    )
    return TextTable("Over benchmarks", columns, tuple(rows), caption)


def further_tables(report: ComparisonReport, confidence: float) -> list[TextTable]:
    """Return both tables, as far as there is something to say.

    Args:
        report: the comparison.
        confidence: of the two-sided intervals.
    """
    found = (benchmarks_table(report, confidence), clustered_table(report, confidence))
    return [table for table in found if table is not None]


def over_benchmarks_json(report: ComparisonReport, confidence: float) -> dict[str, Any] | None:
    """Return what all benchmarks say together, as plain values; None for a single one.

    Args:
        report: the comparison.
        confidence: of the two-sided intervals.
    """
    if len(report.benchmarks) < 2:
        return None
    each, pooled = over_benchmarks(report, confidence)
    return {
        "benchmarks": {name: dataclasses.asdict(found) for name, found in each.items()},
        "pooled": dataclasses.asdict(pooled),
    }
