"""The verdict: within the tolerance, beyond it, or not enough questions to tell.

Both sides of the tolerance are tested, each at the full confidence::

                  tolerance
    |---o---|         :              within: the upper bound lies below the tolerance
                      :  |---o---|   exceeds: the lower bound lies above it
            |---o-----:--|           undecided: the tolerance lies between the bounds

A test of "no drop" alone would pass every candidate of which too few questions were asked. At most one of
the two tests can succeed, so each may err at its whole level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from evaluation.compare.settings import GateSettings
from evaluation.compare.statistics.counts import Strata
from evaluation.compare.statistics.intervals import (
    POWER,
    Interval,
    score_bounds,
    score_z,
    smoothed_spread,
)

WITHIN = "within"
EXCEEDS = "exceeds"
UNDECIDED = "undecided"
# 1 and 2 are taken: a run that failed, a command line that is wrong.
EXIT_CODES = {WITHIN: 0, EXCEEDS: 3, UNDECIDED: 4}
IN_WORDS = {
    WITHIN: "within tolerance",
    EXCEEDS: "exceeds tolerance",
    UNDECIDED: "not enough questions to tell",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a drop is tolerable, tested at both sides of the tolerance.

    Attributes:
        outcome: ``within``, ``exceeds`` or ``undecided``.
        average: which average was judged, ``micro`` or ``macro``.
        max_drop_pp: the tolerance.
        confidence: one-sided.
        drop_pp: observed.
        lower_pp: the drop is above it, with that confidence.
        upper_pp: the drop is below it, with that confidence.
        p_within: chance of so small a drop if the true one were the tolerance.
        p_exceeds: chance of so large a drop if the true one were the tolerance.
        num_samples: questions asked.
        num_needed: questions that would be enough if the drop stays what it is; None where the verdict is
            clear, or where no number would do because the drop equals the tolerance.
    """

    outcome: str
    average: str
    max_drop_pp: float
    confidence: float
    drop_pp: float
    lower_pp: float
    upper_pp: float
    p_within: float
    p_exceeds: float
    num_samples: int
    num_needed: int | None

    def sentence(self) -> str:
        """Say the verdict in words, with the figures it stands on."""
        sure, allowed = f"{100 * self.confidence:g} %", f"{self.max_drop_pp:.2f} points are allowed"
        seen = f"{IN_WORDS[self.outcome]}: the drop is {self.drop_pp:+.2f} points"
        if self.outcome == WITHIN:
            return f"{seen}, with {sure} confidence below {self.upper_pp:+.2f}; {allowed}."
        if self.outcome == EXCEEDS:
            return f"{seen}, with {sure} confidence above {self.lower_pp:+.2f}; {allowed}."
        between = f"{seen}, which may be {self.lower_pp:+.2f} to {self.upper_pp:+.2f}; {allowed}."
        if self.num_needed is None:
            return f"{between} No number of questions tells a drop that equals the tolerance from it."
        return (
            f"{between} About {self.num_needed:,} questions ({self.num_samples:,} were asked) would tell"
            f" in {100 * POWER:g} % of cases, if the drop stays what it is."
        )


Pairs = TypeVar("Pairs", bound="Judged")


def judge_drop(strata: Strata, average: str, gate: GateSettings) -> Verdict:
    """Test a drop against the tolerance, one-sided in both directions.

    Args:
        strata: the pairs, weighted as the average weighs them.
        average: its name, ``micro`` or ``macro``.
        gate: tolerance and confidence.
    """
    from scipy.stats import norm

    z = score_z(strata, gate.max_drop_pp / 100)
    p_values = float(norm.cdf(z)), float(norm.sf(z))
    return conclude(strata, average, gate, p_values, score_bounds(strata, gate.confidence), _num_needed)


class Judged(Protocol):
    """Weighted pairs of two runs, right and wrong or graded."""

    @property
    def drop(self) -> float:
        """Baseline minus candidate, a fraction."""
        ...

    @property
    def num_samples(self) -> int:
        """Questions asked."""
        ...


def conclude(
    strata: Pairs,
    average: str,
    gate: GateSettings,
    p_values: tuple[float, float],
    bounds: Interval,
    needed: Callable[[Pairs, float, float], int | None],
) -> Verdict:
    """Put a verdict together from tests of any kind.

    Args:
        strata: the pairs, weighted as the average weighs them.
        average: its name, ``micro`` or ``macro``.
        gate: tolerance and confidence.
        p_values: that the drop is not within the tolerance, and that it does not exceed it.
        bounds: of the drop, each one-sided at the confidence.
        needed: from pairs, tolerance and confidence how many questions would decide.
    """
    tolerance, level = gate.max_drop_pp / 100, 1 - gate.confidence
    p_within, p_exceeds = p_values
    outcome = WITHIN if p_within <= level else EXCEEDS if p_exceeds <= level else UNDECIDED
    return Verdict(
        outcome=outcome,
        average=average,
        max_drop_pp=gate.max_drop_pp,
        confidence=gate.confidence,
        drop_pp=100 * strata.drop,
        lower_pp=100 * bounds.low,
        upper_pp=100 * bounds.high,
        p_within=p_within,
        p_exceeds=p_exceeds,
        num_samples=strata.num_samples,
        num_needed=needed(strata, tolerance, gate.confidence) if outcome == UNDECIDED else None,
    )


def _num_needed(strata: Strata, tolerance: float, confidence: float) -> int | None:
    """Return how many questions would decide with a chance of ``POWER``, if the drop stays what it is."""
    from scipy.stats import norm

    distance = tolerance - strata.drop
    if abs(distance) < 1e-9:
        return None
    z = float(norm.ppf(confidence) + norm.ppf(POWER))
    # Effective questions first; then as many asked ones per effective one as in this sample.
    effective = smoothed_spread(strata, strata.drop) * (z / distance) ** 2
    return max(strata.num_samples + 1, math.ceil(effective * strata.num_samples / strata.num_effective))


def worst(outcomes: Iterable[str]) -> str:
    """Return the outcome of several: one excess is an excess, one doubt leaves a doubt.

    >>> worst(["within", "undecided"]), worst(["exceeds", "undecided"]), worst(["within"])
    ('undecided', 'exceeds', 'within')
    """
    found = set(outcomes)
    return next(outcome for outcome in (EXCEEDS, UNDECIDED, WITHIN) if outcome in found)
