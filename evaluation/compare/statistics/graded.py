"""The paired comparison of two runs whose answers have grades from 0 to 1 (ROUGE, BLEU, F1).

What `drops` does with counts of flipped answers is done here with the differences themselves: an answer that
is a little worse counts a little. Intervals of a printed drop are the paired bootstrap again; the verdict
rests on one-sided t bounds of the mean difference. A plain t bound is too sure where few answers differ (in
100 questions of which one in twenty differs, 85 % instead of 95 %), so one more difference is counted on the
side of
the bound, as large as the largest seen::

    differences      0 0 0.2 0 -0.1 0 ... 0     n of them, the largest of size M = 0.2
    upper bound      0 0 0.2 0 -0.1 0 ... 0  M
    lower bound      0 0 0.2 0 -0.1 0 ... 0 -M
    no differences   with confidence c fewer than 1 - (1 - c)^(1/n) of all questions differ, each by 1 at most

``tests/evaluation/compare/test_graded.py`` counts how often they hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from evaluation.compare.settings import GateSettings
from evaluation.compare.statistics.drops import Comparison, Drop, JudgedAverage, compare_averages, drop_of
from evaluation.compare.statistics.gate import Verdict, conclude
from evaluation.compare.statistics.intervals import POWER, Interval, Resampled
from evaluation.metrics import MICRO, Groups, Outcome, Score

if TYPE_CHECKING:
    import numpy as np

CELLS_AT_ONCE = 4_000_000
"""Draws of the bootstrap held at a time, 32 MB."""


@dataclass(frozen=True)
class PairedGrades:
    """Grades of two runs on the same questions.

    Attributes:
        before: of the baseline, from 0 to 1.
        after: of the candidate, in the same order.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def num_samples(self) -> int:
        """All questions."""
        return len(self.before)

    @cached_property
    def differences(self) -> np.ndarray:
        """Baseline minus candidate, float64 ``[questions]``."""
        import numpy as np

        return np.asarray(self.before, dtype=float) - np.asarray(self.after, dtype=float)

    def __add__(self, other: PairedGrades) -> PairedGrades:
        """Pool two sets of questions."""
        return PairedGrades(self.before + other.before, self.after + other.after)


@dataclass(frozen=True)
class GradedStrata:
    """Groups of questions with their weights in an average; the weights sum to 1.

    Attributes:
        weights: of each group.
        groups: none empty.
    """

    weights: tuple[float, ...]
    groups: tuple[PairedGrades, ...]

    @staticmethod
    def micro(groups: Iterable[PairedGrades]) -> GradedStrata:
        """Weigh every question alike: one group."""
        return GradedStrata((1.0,), (sum(groups, PairedGrades((), ())),))

    @staticmethod
    def macro(groups: Iterable[PairedGrades]) -> GradedStrata:
        """Weigh every subject alike; those of a single question form one group together, as in `counts`."""
        subjects = list(groups)
        kept = [each for each in subjects if each.num_samples > 1]
        singles = [each for each in subjects if each.num_samples == 1]
        weights = [1 / len(subjects)] * len(kept)
        if singles:
            kept.append(sum(singles, PairedGrades((), ())))
            weights.append(len(singles) / len(subjects))
        return GradedStrata(tuple(weights), tuple(kept))

    @property
    def num_samples(self) -> int:
        """All questions."""
        return sum(each.num_samples for each in self.groups)

    @property
    def drop(self) -> float:
        """Mean grade of the baseline minus that of the candidate, from -1 to 1."""
        pairs = zip(self.weights, self.groups, strict=True)
        return math.fsum(weight * float(each.differences.mean()) for weight, each in pairs)

    @property
    def freedom(self) -> int:
        """Degrees of freedom of its spread."""
        return max(1, self.num_samples - len(self.groups))

    @property
    def num_effective(self) -> float:
        """Questions of equal weight that would tell as much (Kish's effective sample size)."""
        pairs = zip(self.weights, self.groups, strict=True)
        return 1 / sum(weight**2 / each.num_samples for weight, each in pairs)

    def moments(self, side: int) -> tuple[float, float]:
        """Return drop and standard error, with one more difference of the largest size counted.

        Args:
            side: 1 counts it as a drop, -1 as a gain; 0 counts none.
        """
        variance = largest = 0.0
        for weight, each in zip(self.weights, self.groups, strict=True):
            found, size = each.differences, each.num_samples
            squares = float(((found - found.mean()) ** 2).sum())
            variance += weight**2 * squares / max(1, size - 1) / size
            largest = max(largest, float(abs(found).max()))
        if not side:
            return self.drop, math.sqrt(variance)
        # Of one group these are mean and error of n + 1 differences, to the digit; of several, one is added
        # to all of them together: one in each would outweigh small subjects.
        size, away = self.num_effective, side * largest - self.drop
        variance = variance * (size - 1) / (size + 1) + (away / (size + 1)) ** 2
        return self.drop + away / (size + 1), math.sqrt(variance)

    def _both_sides(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return the moments of both bounds; errors are 0 only where nothing differs."""
        (low, low_error), (high, high_error) = self.moments(-1), self.moments(1)
        # Where all answers differ by the same, one more of it on its own side has no spread.
        return (low, low_error or high_error), (high, high_error or low_error)

    def bounds(self, confidence: float) -> Interval:
        """Return the one-sided bounds of the drop: each alone holds with the given confidence."""
        from scipy.stats import t

        (low, low_error), (high, high_error) = self._both_sides()
        if not high_error:  # nothing differs: the rule of three, in its exact form
            half = 1 - (1 - confidence) ** (1 / self.num_samples)
            return Interval(-half, half)
        z = float(t.ppf(confidence, self.freedom))
        return Interval(max(-1.0, low - z * low_error), min(1.0, high + z * high_error))

    def p_values(self, drop: float, confidence: float) -> tuple[float, float]:
        """Return the chances of so small and of so large a drop if the true one were the given one.

        Args:
            drop: supposed.
            confidence: at which the bounds are asked where nothing differs, and there is no spread.
        """
        from scipy.stats import t

        (low, low_error), (high, high_error) = self._both_sides()
        if high_error:
            small = float(t.cdf((high - drop) / high_error, self.freedom))
            return small, float(t.sf((low - drop) / low_error, self.freedom))
        bounds, level = self.bounds(confidence), 1 - confidence
        return (level if drop >= bounds.high else 0.5), (level if drop <= bounds.low else 0.5)


def compare_grades(
    baseline: Sequence[Outcome], candidate: Sequence[Outcome], groups: Groups, gate: GateSettings
) -> Comparison:
    """Compare two runs on the same questions, whose outcomes have grades.

    Args:
        baseline: one outcome per question, at least one.
        candidate: of the same questions in the same order.
        groups: how the benchmark averages.
        gate: tolerance, confidence and draws.
    """
    pairs = _pairs(baseline, candidate)

    def drop(names: Sequence[str], how: str, scores: tuple[Score, Score]) -> Drop:
        return _drop([pairs[name] for name in names], how, scores, gate)

    def judge(names: Sequence[str], average: str, scores: tuple[Score, Score]) -> JudgedAverage:
        chosen = [pairs[name] for name in names]
        strata = (GradedStrata.micro if average == "micro" else GradedStrata.macro)(chosen)
        return JudgedAverage(
            _unpaired_z(*scores),
            _paired_z(GradedStrata.micro(chosen)),
            _min_detectable(strata, gate.confidence),
            judge_grades(strata, average, gate),
        )

    return compare_averages(baseline, candidate, groups, gate, list(pairs), drop, judge)


def judge_grades(strata: GradedStrata, average: str, gate: GateSettings) -> Verdict:
    """Test a drop of grades against the tolerance, one-sided in both directions.

    Args:
        strata: the pairs, weighted as the average weighs them.
        average: its name, ``micro`` or ``macro``.
        gate: tolerance and confidence.
    """
    p_values = strata.p_values(gate.max_drop_pp / 100, gate.confidence)
    return conclude(strata, average, gate, p_values, strata.bounds(gate.confidence), _num_needed)


def _pairs(baseline: Sequence[Outcome], candidate: Sequence[Outcome]) -> dict[str, PairedGrades]:
    found: dict[str, tuple[list[float], list[float]]] = {}
    for one, other in zip(baseline, candidate, strict=True):
        assert (one.subject, one.index) == (other.subject, other.index), "callers match the questions"
        sides = found.setdefault(one.subject, ([], []))
        sides[0].append(one.value)
        sides[1].append(other.value)
    return {name: PairedGrades(tuple(sides[0]), tuple(sides[1])) for name, sides in found.items()}


def _drop(groups: Sequence[PairedGrades], how: str, scores: tuple[Score, Score], gate: GateSettings) -> Drop:
    strata = (GradedStrata.micro if how == MICRO else GradedStrata.macro)(groups)
    pooled = sum(groups, PairedGrades((), ()))
    changed = int((pooled.differences > 0).sum()), int((pooled.differences < 0).sum())
    return drop_of(scores, bootstrap_grades(strata, gate), pooled.num_samples, changed, _paired_p(pooled))


def bootstrap_grades(strata: GradedStrata, gate: GateSettings) -> Resampled:
    """Draw questions with replacement, both runs' grades together, and take percentiles.

    Args:
        strata: one group (micro), drawn at its size, or one per subject (macro), each drawn at its size less
            one (see `intervals.bootstrap`, which does the same with counts).
        gate: confidence, draws and seed.

    Returns:
        Both intervals; that of the retention is None where the baseline has no grade above 0.
    """
    import numpy as np

    generator = np.random.default_rng(gate.seed)
    before, after = np.zeros(gate.num_resamples), np.zeros(gate.num_resamples)
    for weight, each in zip(strata.weights, strata.groups, strict=True):
        size = each.num_samples
        drawn = size if len(strata.groups) == 1 else max(1, size - 1)
        one, other = np.asarray(each.before), np.asarray(each.after)
        at_once = max(1, CELLS_AT_ONCE // size)
        for start in range(0, gate.num_resamples, at_once):
            count = min(at_once, gate.num_resamples - start)
            times = generator.multinomial(drawn, np.full(size, 1 / size), count)
            before[start : start + count] += weight * (times @ one) / drawn
            after[start : start + count] += weight * (times @ other) / drawn
    ends = [50 * (1 - gate.confidence), 50 * (1 + gate.confidence)]
    low, high = np.percentile(before - after, ends)
    kept = before > 0
    retention = None
    if any(any(each.before) for each in strata.groups) and kept.any():
        retention = Interval(*map(float, np.percentile(after[kept] / before[kept], ends)))
    return Resampled(Interval(float(low), float(high)), retention)


def _paired_p(pairs: PairedGrades) -> float:
    """Return the two-sided p-value of the paired t test; 1 where nothing differs or one question is all."""
    from scipy.stats import t

    z = _paired_z(GradedStrata.micro([pairs]))
    return 1.0 if z is None else float(2 * t.sf(abs(z), max(1, pairs.num_samples - 1)))


def _paired_z(strata: GradedStrata) -> float | None:
    drop, error = strata.moments(0)
    return drop / error if error else None


def _unpaired_z(baseline: Score, candidate: Score) -> float | None:
    variance = sum((each.stderr or 0.0) ** 2 for each in (baseline, candidate))
    return (baseline.accuracy - candidate.accuracy) / math.sqrt(variance) if variance else None


def _effective_spread(strata: GradedStrata) -> float:
    """Return the variance of one question's difference, as if all weighed alike; never 0."""
    spread = strata.moments(1)[1] ** 2 * strata.num_samples
    # Nothing differs: two of so many more questions might, each by 1.
    return spread or 2 / (strata.num_samples + 4)


def _min_detectable(strata: GradedStrata, confidence: float) -> float:
    from scipy.stats import norm

    z = float(norm.ppf(confidence) + norm.ppf(POWER))
    return min(1.0, z * math.sqrt(_effective_spread(strata) / strata.num_samples))


def _num_needed(strata: GradedStrata, tolerance: float, confidence: float) -> int | None:
    from scipy.stats import norm

    distance = tolerance - strata.drop
    if abs(distance) < 1e-9:
        return None
    z = float(norm.ppf(confidence) + norm.ppf(POWER))
    return max(strata.num_samples + 1, math.ceil(_effective_spread(strata) * (z / distance) ** 2))


def has_grades(*sides: Sequence[Outcome]) -> bool:
    """Say whether outcomes are graded.

    Args:
        sides: of a comparison, which are read by the same rule.
    """
    return any(outcome.score is not None for side in sides for outcome in side)
