"""Paired answers as counts: right in both runs, in one of them, in neither; and how strata are averaged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from evaluation.metrics import Outcome

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class PairCounts:
    """How two runs did on the same questions.

    Attributes:
        both: questions right in both runs.
        lost: right in the baseline alone.
        gained: right in the candidate alone.
        neither: right in none.
    """

    both: int = 0
    lost: int = 0
    gained: int = 0
    neither: int = 0

    @property
    def num_samples(self) -> int:
        """All questions."""
        return self.both + self.lost + self.gained + self.neither

    @property
    def num_discordant(self) -> int:
        """Questions that one run answers rightly and the other does not."""
        return self.lost + self.gained

    @property
    def cells(self) -> tuple[int, int, int, int]:
        """The four counts, in the order of the attributes."""
        return (self.both, self.lost, self.gained, self.neither)

    def __add__(self, other: PairCounts) -> PairCounts:
        """Pool two sets of questions."""
        return PairCounts(*(a + b for a, b in zip(self.cells, other.cells, strict=True)))


def count_pairs(baseline: Sequence[Outcome], candidate: Sequence[Outcome]) -> dict[str, PairCounts]:
    """Count the pairs of every subject.

    Args:
        baseline: one outcome per question.
        candidate: of the same questions in the same order.

    Returns:
        Subject to its counts, in the order of the questions.

    >>> right, wrong = Outcome("law", 0, True), Outcome("law", 0, False)
    >>> count_pairs([right, right, wrong], [right, wrong, wrong])
    {'law': PairCounts(both=1, lost=1, gained=0, neither=1)}
    """
    found: dict[str, list[int]] = {}
    for before, after in zip(baseline, candidate, strict=True):
        assert (before.subject, before.index) == (after.subject, after.index), "callers match the questions"
        cell = 2 * (not before.is_correct) + (not after.is_correct)
        found.setdefault(before.subject, [0, 0, 0, 0])[cell] += 1
    return {subject: PairCounts(*cells) for subject, cells in found.items()}


@dataclass(frozen=True)
class Strata:
    """Groups of questions with their weights in an average; the weights sum to 1.

    Attributes:
        weights: of each group.
        counts: of each group, none empty.
    """

    weights: tuple[float, ...]
    counts: tuple[PairCounts, ...]

    @staticmethod
    def micro(counts: Iterable[PairCounts]) -> Strata:
        """Weigh every question alike: one group."""
        return Strata((1.0,), (sum(counts, PairCounts()),))

    @staticmethod
    def macro(counts: Iterable[PairCounts]) -> Strata:
        """Weigh every subject alike.

        Subjects of a single question, which say nothing about their own spread, form one group together.
        """
        subjects = list(counts)
        groups = [each for each in subjects if each.num_samples > 1]
        singles = [each for each in subjects if each.num_samples == 1]
        weights = [1 / len(subjects)] * len(groups)
        if singles:
            groups.append(sum(singles, PairCounts()))
            weights.append(len(singles) / len(subjects))
        return Strata(tuple(weights), tuple(groups))

    @property
    def num_samples(self) -> int:
        """All questions."""
        return sum(each.num_samples for each in self.counts)

    @cached_property
    def rates(self) -> np.ndarray:
        """Weighted shares of the four cells, float64 ``[4]``, in the order of ``PairCounts``."""
        import numpy as np

        shares = np.array([each.cells for each in self.counts], dtype=float)
        shares /= shares.sum(axis=1, keepdims=True)
        return np.asarray(self.weights) @ shares

    @property
    def drop(self) -> float:
        """Baseline accuracy minus candidate accuracy, from -1 to 1."""
        return float(self.rates[1] - self.rates[2])

    @property
    def discordant_frac(self) -> float:
        """Weighted share of questions that one run alone answers rightly."""
        return float(self.rates[1] + self.rates[2])

    @property
    def num_effective(self) -> float:
        """Questions that would give the drop's standard error if all weighed the same; at most all there are.

        Equal to the number of questions for a micro average. Source: the effective sample size of survey
        statistics, Korn and Graubard 1998, "Confidence intervals for proportions with small expected number
        of positive counts estimated from survey data".
        """
        if len(self.counts) == 1:
            return float(self.num_samples)
        # Variance of a weighted sum of independent subjects, beside that of one pooled question: their ratio
        # is the number of questions that tell as much.
        variance = 0.0
        for weight, each in zip(self.weights, self.counts, strict=True):
            size = each.num_samples
            mean = (each.lost - each.gained) / size
            spread = (each.num_discordant / size - mean**2) * size / max(1, size - 1)
            variance += weight**2 * spread / size
        pooled = self.discordant_frac - self.drop**2
        if variance <= 0 or pooled <= 0:  # no flips: the weights alone (Kish's effective sample size)
            pairs = zip(self.weights, self.counts, strict=True)
            return 1 / sum(weight**2 / each.num_samples for weight, each in pairs)
        # Subjects that differ much can make the ratio larger than the sample; a test must not profit from it.
        return min(float(self.num_samples), pooled / variance)
