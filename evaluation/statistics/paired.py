"""Two runs on the same questions, whose scores may be any fractions: shares of several answers.

Where every score is 0 or 1, `evaluation.compare.statistics` has sharper tools (exact tests, score intervals).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.statistics import without_spread

ROUNDING = 1e-12
"""Below it a standard error is what equal differences leave behind when their mean is rounded."""


@dataclass(frozen=True, slots=True)
class PairedMean:
    """A mean difference over questions, in fractions of 1.

    Attributes:
        mean: weighted mean of the differences.
        stderr: its standard error; 0 where no question differs from another.
        low: lower end of the interval.
        high: upper end.
        p_value: two-sided, of no difference.
        num_questions: n.
    """

    mean: float
    stderr: float
    low: float
    high: float
    p_value: float
    num_questions: int


def paired_mean(
    differences: Sequence[float], groups: Sequence[Sequence[int]], *, confidence: float = 0.95
) -> PairedMean | None:
    """Average differences of scores, and test that the average is 0: the paired t test, over strata.

    Args:
        differences: of each question.
        groups: places of the questions of each stratum; strata weigh the same, and so do the questions in
            one. A micro average is one stratum, a macro average one per subject.
        confidence: of the two-sided interval.

    Returns:
        None where a single question tells nothing of its spread in every stratum.

    Source:
        Student 1908; for several strata the degrees of freedom are those of Satterthwaite 1946, "An
        approximate distribution of estimates of variance components".
    """
    import numpy as np
    from scipy.stats import t

    values = np.asarray(differences, dtype=float)
    # Strata of one question have no spread of their own: together they form one (as `Strata.macro` does).
    single = [places[0] for places in groups if len(places) == 1]
    strata = [(list(places), 1 / len(groups)) for places in groups if len(places) > 1]
    if single:
        strata.append((single, len(single) / len(groups)))
    mean = sum(weight * float(values[places].mean()) for places, weight in strata)
    parts = [
        (weight**2 * float(values[places].var(ddof=1)) / len(places), len(places) - 1)
        for places, weight in strata
        if len(places) > 1
    ]
    if not parts:
        return None
    variance = sum(part for part, _ in parts)
    stderr = math.sqrt(variance)
    if stderr < ROUNDING:
        stderr = 0.0
    below = sum(part**2 / degrees for part, degrees in parts)
    if not stderr:
        low, high = without_spread.bounds(mean, len(values), confidence=confidence)
        return PairedMean(mean, 0.0, low, high, without_spread.p_value(mean, len(values)), len(values))
    degrees = variance**2 / below
    half = float(t.ppf((1 + confidence) / 2, degrees)) * stderr
    p_value = float(2 * t.sf(abs(mean) / stderr, degrees))
    return PairedMean(mean, stderr, mean - half, mean + half, p_value, len(values))
