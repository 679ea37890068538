"""Errors of an average from clusters of questions, beside the usual one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.metrics import MACRO, Groups, Outcome, summarize_outcomes
from evaluation.statistics.clustered import (
    CLUSTER,
    FEW_CLUSTERS,
    SUBJECT,
    Clustered,
    clustered_mean,
    macro_weights,
)
from glmtune.tables import TextTable

CONFIDENCE = 0.95
METHOD = "Miller 2024, eq. 4; Student's t with one degree of freedom less than clusters"


@dataclass(frozen=True, slots=True)
class ClusterRow:
    """An average with its error from one way to cluster.

    Attributes:
        by: ``subject``, or ``cluster`` (what the benchmark names as such, a document for instance).
        average: ``accuracy_micro`` or ``accuracy_macro``, the one that the benchmark publishes.
        found: the average and its error.
    """

    by: str
    average: str
    found: Clustered

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the method named."""
        return {
            **dataclasses.asdict(self.found),
            "design_effect": self.found.design_effect,
            "average": self.average,
            "method": METHOD,
        }


def cluster_rows(outcomes: Sequence[Outcome], groups: Groups) -> list[ClusterRow]:
    """Put errors from clusters around the average that a benchmark publishes.

    Args:
        outcomes: one per question; at least one.
        groups: of the benchmark.

    Returns:
        By subject where there are several, and by the cluster that the questions name where they do.
    """
    averaged = set(groups.averaged(dict.fromkeys(outcome.subject for outcome in outcomes)))
    rows = [outcome for outcome in outcomes if outcome.subject in averaged]
    subjects = [row.subject for row in rows]
    ways: dict[str, list[object]] = {SUBJECT: list(subjects)}
    if all(row.cluster for row in rows):
        ways[CLUSTER] = [row.cluster for row in rows]
    weights = macro_weights(subjects) if groups.headline == MACRO else None
    # Beside it stands the error that the other tables have: over subjects, where these are averaged.
    summary = summarize_outcomes(rows, Groups(headline=groups.headline))
    found = {
        by: clustered_mean(
            [row.value for row in rows], clusters, weights=weights, confidence=CONFIDENCE, lowest=0.0
        )
        for by, clusters in ways.items()
    }
    return [
        ClusterRow(by, groups.headline, dataclasses.replace(each, stderr_usual=summary.stderr or 0.0))
        for by, each in found.items()
        if each is not None
    ]


def cluster_table(rows: Sequence[ClusterRow], column: str = "accuracy, %") -> TextTable | None:
    """Lay out errors from clusters beside the usual one.

    Args:
        rows: of one run.
        column: what the average is called.

    Returns:
        None where nothing is clustered.
    """
    if not rows:
        return None
    cells = tuple(
        (
            row.by,
            f"{row.found.num_questions:,}",
            f"{row.found.num_clusters:,}",
            f"{100 * row.found.mean:.2f}",
            f"{100 * row.found.stderr_usual:.2f}",
            f"{100 * row.found.stderr:.2f}",
            # Of two or three clusters it reaches beyond what an average can be.
            f"{100 * max(0.0, row.found.low):.2f} to {100 * min(1.0, row.found.high):.2f}",
            "–" if row.found.design_effect is None else f"{row.found.design_effect:.2f}",
        )
        for row in rows
    )
    columns = (
        "clusters", "n", "n clusters", column, "± s.e., alone", "± s.e., clustered", "95 % interval",
        "design effect",
    )  # fmt: skip
    caption = f"{rows[0].average.removeprefix('accuracy_').capitalize()} average. {METHOD}."
    if any(row.found.num_clusters < FEW_CLUSTERS for row in rows):
        caption += f" Below {FEW_CLUSTERS} clusters such an error is uncertain itself."
    return TextTable("Clustered errors", columns, cells, caption)
