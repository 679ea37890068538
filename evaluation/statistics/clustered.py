"""Errors of an average whose questions come in clusters: of one subject, about one document.

Questions about one document are hard together, so a hundred of them say less than a hundred about as many
documents. The usual standard error does not know that. It is put right by adding, inside every cluster, what
any two of its questions have in common::

    s1 s2 s3 | s4 s5 | s6          scores, three clusters
    [x x x]                        sum of (s_i - mean)(s_j - mean) over all pairs of one cluster, i and j
             [x x]                 differing; clusters are taken for independent of each other
                     [x]
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from evaluation.statistics import without_spread

SUBJECT, CLUSTER = "subject", "cluster"
"""Ways to cluster questions: by their subject, or by what the benchmark names, a document for instance."""
MIN_CLUSTERS = 2
ROUNDING = 1e-12
"""Below it a standard error is what equal scores leave behind when their mean is rounded."""
FEW_CLUSTERS = 20
"""Below so many an error from clusters is itself uncertain, and is said to be."""


@dataclass(frozen=True, slots=True)
class Clustered:
    """An average with its error from clusters, in fractions of 1.

    Attributes:
        mean: weighted average.
        stderr: its standard error from clusters.
        stderr_usual: as if every question stood alone; with weights, without regard to groups either.
        low: lower end of the interval.
        high: upper end.
        p_value: two-sided, of an average of 0.
        num_questions: n.
        num_clusters: G.
    """

    mean: float
    stderr: float
    stderr_usual: float
    low: float
    high: float
    p_value: float
    num_questions: int
    num_clusters: int

    @property
    def design_effect(self) -> float | None:
        """How many times larger the variance is than without clusters; None where that is 0."""
        return (self.stderr / self.stderr_usual) ** 2 if self.stderr_usual else None


def clustered_mean(
    scores: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
    lowest: float = -1.0,
) -> Clustered | None:
    """Average scores, and put an error around the average that knows of clusters.

    With equal weights the standard error is equation 4 of Miller 2024. With others (a macro average) every
    deviation is weighed, ``sum over clusters of (sum over i of w_i (s_i - mean))^2``; where the clusters are
    the subjects of a macro average, that is the spread of the subjects' averages. The interval multiplies the
    standard error by ``sqrt(G / (G - 1))`` and takes Student's t with ``G - 1`` degrees of freedom, without
    which it would be too short for few clusters.

    Args:
        scores: of each question (or differences of two scores).
        clusters: to which each belongs.
        weights: of each in the average, their sum being 1; None weighs all alike.
        confidence: of the two-sided interval.
        lowest: that a score can be; it counts where clusters do not differ (`without_spread`).

    Returns:
        None where there are fewer than two clusters: one alone says nothing about others.

    Source:
        Miller 2024, "Adding error bars to evals", arXiv:2411.00640, equation 4; Cameron and Miller 2015, "A
        practitioner's guide to cluster-robust inference", section VI, for few clusters.
    """
    import numpy as np
    from scipy.stats import t

    values = np.asarray(scores, dtype=float)
    count = len(values)
    shares = np.full(count, 1 / count) if weights is None else np.asarray(weights, dtype=float)
    places: dict[Hashable, int] = {}
    cluster = np.array([places.setdefault(each, len(places)) for each in clusters], dtype=int)
    if len(places) < MIN_CLUSTERS:
        return None
    mean = float(shares @ values)
    moved = shares * (values - mean)
    alone = float(moved @ moved)
    pairs = float((np.bincount(cluster, weights=moved) ** 2).sum()) - alone
    # The usual error counts n - 1; what pairs of a cluster add does not, as in the paper.
    usual = math.sqrt(alone if weights is not None else alone * count / (count - 1))
    stderr = math.sqrt(max(0.0, usual**2 + pairs))
    if stderr < ROUNDING:
        low, high = without_spread.bounds(mean, len(places), confidence=confidence, lowest=lowest)
        p_value = without_spread.p_value(mean, len(places))
        return Clustered(mean, 0.0, usual, low, high, p_value, count, len(places))
    degrees = len(places) - 1
    wide = stderr * math.sqrt(len(places) / degrees)
    half = float(t.ppf((1 + confidence) / 2, degrees)) * wide
    p_value = float(2 * t.sf(abs(mean) / wide, degrees))
    return Clustered(mean, stderr, usual, mean - half, mean + half, p_value, count, len(places))


def macro_weights(subjects: Sequence[Hashable]) -> list[float]:
    """Return the weight of every question in a mean over subjects.

    >>> macro_weights(["law", "law", "art"])
    [0.25, 0.25, 0.5]
    """
    sizes: dict[Hashable, int] = {}
    for subject in subjects:
        sizes[subject] = sizes.get(subject, 0) + 1
    return [1 / (len(sizes) * sizes[subject]) for subject in subjects]
