"""Intervals and tests for a difference of two accuracies on the same questions.

Pairs, because most of the uncertainty of an accuracy is which questions happened to be asked, and both runs
were asked the same: on a question that both answer alike nothing tells them apart, so only the discordant
pairs (lost, gained) enter. Each tool has its place:

* score test (``score_z``, ``score_bounds``): the verdict and its bounds, honest where few answers flipped.
* bootstrap: the intervals printed beside a drop and a retention, for any average.
* McNemar's exact test: whether anything changed at all, per category and subject, with Holm's correction.
* unpaired z: only to show what published averages could say without pairs.

``tests/evaluation/compare/test_statistics.py`` sets them beside statsmodels and brute force,
``test_simulation.py`` counts how often they hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from evaluation.compare.statistics.counts import PairCounts, Strata
from evaluation.metrics import Score

POWER = 0.8
"""Chance of finding a drop, wherever a number of questions or a smallest drop is computed."""
ALMOST_ONE = 1 - 1e-12
"""A supposed drop of 1 leaves no variance to divide by."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval, in fractions of 1 and not in points.

    Attributes:
        low: lower end.
        high: upper end.
    """

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Resampled:
    """Intervals of one bootstrap.

    Attributes:
        drop: interval of baseline minus candidate, as a fraction.
        retention: interval of candidate / baseline; None where the baseline has nothing right.
    """

    drop: Interval
    retention: Interval | None


def mcnemar(counts: PairCounts) -> float:
    """Return the exact two-sided p-value of McNemar's test: are losses as likely as gains?

    >>> round(mcnemar(PairCounts(lost=10, gained=2)), 4)
    0.0386

    Source:
        McNemar 1947; the exact form is the binomial test on the discordant pairs.
    """
    from scipy.stats import binomtest

    if not counts.num_discordant:
        return 1.0
    return float(binomtest(counts.lost, counts.num_discordant).pvalue)


def unpaired_z(baseline: Score, candidate: Score) -> float | None:
    """Return the z of two accuracies as if both had been measured on different questions.

    Args:
        baseline: accuracy and number of questions.
        candidate: the same of the other run.

    Returns:
        Positive for a drop; None where neither has any spread.

    >>> round(unpaired_z(Score(721 / 1346, 1346, None), Score(677 / 1346, 1346, None)), 2)
    1.7
    """
    variance = sum(each.accuracy * (1 - each.accuracy) / each.num_samples for each in (baseline, candidate))
    return (baseline.accuracy - candidate.accuracy) / math.sqrt(variance) if variance else None


def paired_z(drop: float, discordant_frac: float, num_samples: float) -> float | None:
    """Return McNemar's z: the drop in standard errors under equality; None where nothing flipped.

    >>> round(paired_z(44 / 1346, 0.15, 1346), 1)
    3.1
    """
    return drop * math.sqrt(num_samples / discordant_frac) if discordant_frac else None


def two_sided_p(z: float | None) -> float:
    """Return the two-sided p-value of a z; 1 without one."""
    from scipy.stats import norm

    return 1.0 if z is None else float(2 * norm.sf(abs(z)))


def bootstrap(strata: Strata, *, confidence: float, num_resamples: int, seed: int) -> Resampled:
    """Draw questions with replacement, both runs' answers together, and take percentiles.

    Only the four counts of a group matter, so each draw is one multinomial draw of them: the same
    distribution as drawing questions one by one. One group is drawn at its size; several (subjects) at their
    size less one, which makes up for the spread that small groups hide.

    Args:
        strata: one group (micro) or one per subject (macro).
        confidence: of the two-sided intervals.
        num_resamples: draws.
        seed: of the draws; the same figures every time.

    Source:
        Efron and Tibshirani 1993, chapter 13; Rao and Wu 1988, "Resampling inference with complex survey
        data", for several groups.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    rates = np.zeros((num_resamples, 4))
    for weight, each in zip(strata.weights, strata.counts, strict=True):
        size = each.num_samples
        # The rates of a sample of n vary by (n - 1) / n of what the population's do: nothing at 1,346
        # questions, 8 % of the variance in a subject of 12. One draw less makes up for it (Rao and Wu).
        drawn = size if len(strata.counts) == 1 else max(1, size - 1)
        rates += weight * generator.multinomial(drawn, np.array(each.cells) / size, num_resamples) / drawn
    ends = [50 * (1 - confidence), 50 * (1 + confidence)]
    low, high = np.percentile(rates[:, 1] - rates[:, 2], ends)
    before, after = rates[:, 0] + rates[:, 1], rates[:, 0] + rates[:, 2]
    kept = before > 0  # a draw in which the baseline has nothing right has no ratio
    retention = None
    if strata.rates[0] + strata.rates[1] > 0:
        retention = Interval(*map(float, np.percentile(after[kept] / before[kept], ends)))
    return Resampled(Interval(float(low), float(high)), retention)


def score_z(strata: Strata, drop: float) -> float:
    """Return how many standard errors the observed drop lies above a supposed one.

    The standard error is that of the supposed drop, not of the sample: it stays honest where few or no
    answers flipped, where the bootstrap (which can only repeat what it saw) is sure of everything.

    Args:
        strata: the pairs.
        drop: the supposed drop, above -1 and below 1.

    Source:
        Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
        paired-sample design", equations 3 and 5.
    """
    # Of all rates with lost - gained = drop, the likeliest for what was seen: gain_rate solves
    # 2 n x^2 + linear x - gained drop (1 - drop) = 0, and the standard error follows from it.
    size = strata.num_effective
    lost, gained = float(strata.rates[1]) * size, float(strata.rates[2]) * size
    linear = -lost - gained + (2 * size - lost + gained) * drop
    root = math.sqrt(max(0.0, linear**2 + 8 * size * gained * drop * (1 - drop)))
    gain_rate = (root - linear) / (4 * size)
    variance = size * (2 * gain_rate + drop * (1 - drop))
    distance = lost - gained - size * drop
    if variance <= 0:  # no flips, and a supposed drop of 0: exactly what was seen, or impossible
        return 0.0 if abs(distance) < 1e-9 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def score_bounds(strata: Strata, confidence: float) -> Interval:
    """Return the one-sided bounds of a drop: each alone holds with the given confidence.

    Args:
        strata: the pairs.
        confidence: one-sided.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    z = float(norm.ppf(confidence))

    def root(target: float, low: float, high: float) -> float:
        found = brentq(lambda drop: score_z(strata, drop) - target, low, high, xtol=1e-10)
        assert isinstance(found, float), "without full_output it is the root alone"
        return found

    # The z falls as the supposed drop rises and is 0 at the observed one: one crossing on each side of it.
    drop = strata.drop
    low = -1.0 if drop <= -ALMOST_ONE else root(z, -ALMOST_ONE, drop)
    high = 1.0 if drop >= ALMOST_ONE else root(-z, drop, ALMOST_ONE)
    return Interval(low, high)


def smoothed_spread(strata: Strata, drop: float) -> float:
    """Return the variance of one question's difference, one flip added each way so that it is never 0.

    Without it a sample in which nothing flipped has no variance, and any number of questions would seem
    enough.
    """
    # One question is added to each of the four cells: four questions, two of them flips.
    size = strata.num_effective
    return (strata.discordant_frac * size + 2) / (size + 4) - drop**2


def min_detectable_drop(strata: Strata, confidence: float) -> float:
    """Return the smallest true drop that this many questions would show, four times in five.

    Args:
        strata: the pairs; their share of flipped answers is taken for the true one.
        confidence: of the one-sided test of no drop.
    """
    from scipy.stats import norm

    # The usual sum of a sample size: one quantile keeps false alarms rare, the other finds what is there.
    z = float(norm.ppf(confidence) + norm.ppf(POWER))
    return min(1.0, z * math.sqrt(smoothed_spread(strata, 0.0) / strata.num_effective))
