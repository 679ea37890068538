"""Which point is the best, and how sure that is: figures over seeds, where luck of a seed looks like merit.

The best of many noisy figures is too good: with 12 points that are all alike, the luckiest stands well above
the mean of all. So three questions are answered beside the table:

* which points may be the best: a set that holds the truly best one with 95 % confidence;
* how probable it is of each, if nothing was known before;
* what the chosen one would score on a seed that took no part in choosing it.

All three are of seeds: what other rows to evaluate on would have said, no number of seeds tells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from glmtune.sweep.space import Point

Numbers = NDArray[np.float64]
CONFIDENCE = 0.95
NUM_DRAWS = 20_000
"""The chance of a point is known to 0.7 percentage points then."""


@dataclass(frozen=True)
class PointResult:
    """What a point scored.

    Attributes:
        point: its values.
        by_seed: figure of each seed that was trained to the end.
        failed: seeds that failed, with the reason.
        low: lower end of the 95 % interval of the mean over seeds; None with one seed.
        high: upper end.
        chance: that its mean over all seeds there could be is the best; None where it cannot be told.
        p_value: that a figure so much worse than another's comes by luck of the seeds although it is the
            best, corrected for the number of others; None likewise.
    """

    point: Point
    by_seed: Mapping[int, float]
    failed: Mapping[int, str] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    p_value: float | None = None

    @property
    def mean(self) -> float:
        """Mean over seeds; not a number where none was trained to the end."""
        values = list(self.by_seed.values())
        return sum(values) / len(values) if values else math.nan

    @property
    def may_be_best(self) -> bool | None:
        """Whether it belongs to the set that holds the best one; None where it cannot be told."""
        return None if self.p_value is None else self.p_value >= 1 - CONFIDENCE


@dataclass(frozen=True)
class Ranking:
    """All points, and what is known of the best.

    Attributes:
        results: the best mean first; points with failed seeds after those without, then those without any
            figure.
        left_out: mean figure, on a seed left out, of the point that the other seeds choose; None where there
            are no two seeds that all share.
    """

    results: tuple[PointResult, ...]
    left_out: float | None = None

    @property
    def best(self) -> PointResult | None:
        """The first, if it has a figure."""
        return self.results[0] if self.results and self.results[0].by_seed else None

    @property
    def num_candidates(self) -> int:
        """How many points may be the best."""
        return sum(bool(result.may_be_best) for result in self.results)


def rank(results: Sequence[PointResult], *, larger_is_better: bool) -> Ranking:
    """Order points, and say what their seeds tell.

    A point that failed with some seed is not called the best while another did not fail: whoever repeats it
    may meet the same.

    Args:
        results: figures by seed.
        larger_is_better: which way is up.

    Source:
        The set: a point is left out where it is significantly worse than some other (one-sided t-test of
        Welch 1947, Bonferroni over the others). The best one is worse than nobody, so it is left out with at
        most 5 % probability, whatever was looked at before; Hsu 1996, "Multiple Comparisons", ch. 4, is the
        same for equal variances. The chance: draws from the posterior of each mean under the usual flat
        prior, mean + s / sqrt(n) * t(n - 1) (Gelman et al., "Bayesian Data Analysis", 3.2).
    """
    sign = 1.0 if larger_is_better else -1.0
    ordered = sorted(
        results,
        key=lambda each: (not each.by_seed, bool(each.failed), -sign * each.mean if each.by_seed else 0),
    )
    told = [place for place, each in enumerate(ordered) if len(each.by_seed) > 1]
    chances = _chances([sign * _values(ordered[place]) for place in told])
    p_values = _p_values([sign * _values(ordered[place]) for place in told])
    found: list[PointResult] = []
    for place, each in enumerate(ordered):
        low, high = interval(_values(each))
        known = told.index(place) if place in told else None
        found.append(
            PointResult(
                each.point,
                each.by_seed,
                each.failed,
                low,
                high,
                None if known is None else chances[known],
                None if known is None else p_values[known],
            )
        )
    return Ranking(tuple(found), _left_out(ordered, sign))


def _values(result: PointResult) -> Numbers:
    return np.array(list(result.by_seed.values()), dtype=np.float64)


def interval(values: Numbers) -> tuple[float | None, float | None]:
    """Return the 95 % interval of a mean by Student's t; None for fewer than two values.

    Args:
        values: ``[n]``.

    >>> [round(end, 3) for end in interval(np.array([1.0, 2.0, 3.0]))]
    [-0.484, 4.484]
    """
    from scipy import stats

    if len(values) < 2:
        return None, None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * _standard_error(values)
    return float(values.mean()) - half, float(values.mean()) + half


def _standard_error(values: Numbers) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _chances(points: Sequence[Numbers]) -> list[float]:
    """Return the probability of each to have the largest mean; equal draws share it."""
    if not points:
        return []
    generator = np.random.default_rng(0)
    draws = np.stack(
        [
            values.mean() + _standard_error(values) * generator.standard_t(len(values) - 1, size=NUM_DRAWS)
            for values in points
        ]
    )
    is_best = draws == draws.max(axis=0)
    return [float(share) for share in (is_best / is_best.sum(axis=0)).mean(axis=1)]


def _p_values(points: Sequence[Numbers]) -> list[float]:
    """Return the smallest one-sided p-value of each against the others, times their number."""
    if len(points) < 2:
        return [1.0] * len(points)
    means = np.array([values.mean() for values in points])
    errors = np.array([_standard_error(values) ** 2 for values in points])
    freedom = np.array([len(values) - 1 for values in points])
    worse = welch(means, errors, freedom)
    # Nobody is worse than himself: without this the diagonal would be 0.5, and smaller than some p-values.
    np.fill_diagonal(worse, 1.0)
    return [float(value) for value in np.minimum(1.0, (len(points) - 1) * worse.min(axis=1))]


def welch(means: Numbers, errors: Numbers, freedom: Numbers) -> Numbers:
    """Return how probable so much smaller a mean is by chance, of each against each.

    Args:
        means: ``[k]``.
        errors: ``[k]``, squared standard errors of the means.
        freedom: ``[k]``, values of each less one.

    Returns:
        ``[k, k]``, one-sided p-values of "row i is truly smaller than column j". Where neither has any
        spread, 0 for the smaller and 1 for others.
    """
    from scipy import stats

    differences, total = np.subtract.outer(means, means), np.add.outer(errors, errors)
    parts = errors**2 / freedom
    with np.errstate(divide="ignore", invalid="ignore"):
        t = differences / np.sqrt(total)
        found = stats.t.cdf(t, total**2 / np.add.outer(parts, parts))
    return np.where(total > 0, found, np.where(differences < 0, 0.0, 1.0))


def _left_out(results: Sequence[PointResult], sign: float) -> float | None:
    """Let the other seeds choose for every seed in turn, and average what it then says of their choice."""
    whole = [each for each in results if each.by_seed and not each.failed]
    seeds = sorted(set.intersection(*(set(each.by_seed) for each in whole))) if whole else []
    if len(seeds) < 2 or len(whole) < 2:
        return None
    table = np.array([[each.by_seed[seed] for seed in seeds] for each in whole])
    found = [
        table[int(np.argmax(sign * np.delete(table, place, axis=1).mean(axis=1))), place]
        for place in range(len(seeds))
    ]
    return float(np.mean(found))
