"""Whether one run is better than another: the paired bootstrap over rows that both answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from glmtune.metrics.summary import NUM_RESAMPLES, ScoreTable, percentile_interval, resamples
from glmtune.metrics.text import METRICS, RowScores

LEVEL = 0.05
"""Below this p-value a change is called one."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of two runs.

    Attributes:
        metric: a name in ``METRICS``.
        a: figure of the first run, 0 to 100.
        b: figure of the second.
        change: b minus a, in points.
        low: lower end of the change's 95 % interval.
        high: upper end.
        p_value: two-sided chance of so clear a change if the runs were equally good.
    """

    metric: str
    a: float
    b: float
    change: float
    low: float
    high: float
    p_value: float

    @property
    def is_significant(self) -> bool:
        """Whether the change is taken for real at the 5 % level."""
        return self.p_value < LEVEL

    def to_json(self) -> dict[str, object]:
        """Return plain values for a comparison file, the verdict included."""
        return {**asdict(self), "is_significant": self.is_significant, "verdict": self.verdict()}

    def verdict(self, a: str = "a", b: str = "b") -> str:
        """Say the outcome in a sentence, the runs by their names.

        >>> Difference("bleu-4", 5.0, 8.0, 3.0, 2.5, 3.5, 0.001).verdict("before", "after")
        '`after` is better than `before` in bleu-4: +3.00 points (95 % interval +2.50 to +3.50, p = 0.001).'
        """
        figures = f"{self.change:+.2f} points (95 % interval {self.low:+.2f} to {self.high:+.2f}, "
        figures += f"p {'< 0.001' if self.p_value < 0.001 else f'= {self.p_value:.3f}'})"
        if not self.is_significant:
            return f"`{a}` and `{b}` do not differ significantly in {self.metric}: {figures}."
        word = "better" if self.change > 0 else "worse"
        return f"`{b}` is {word} than `{a}` in {self.metric}: {figures}."


def paired_bootstrap(
    a: Sequence[RowScores], b: Sequence[RowScores], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[Difference, ...]:
    """Compare two runs on the same rows.

    Rows are drawn with replacement and both runs scored on the draw, so what makes a row hard cancels out.
    The p-value is twice the share of draws in which the change is not on its side of zero, never below
    2 / (draws + 1); it agrees with the interval about whether zero is in.

    Args:
        a: row scores of the first run.
        b: row scores of the second; row i answers the same question as row i of ``a``.
        num_resamples: number of draws.
        seed: of the draws.

    Returns:
        One difference per name in ``METRICS``.

    Source:
        Koehn 2004, "Statistical significance tests for machine translation evaluation", section 3.
    """
    assert len(a) == len(b) > 0, "callers match the rows first"
    tables = ScoreTable.of(a), ScoreTable.of(b)
    whole = np.ones((1, len(a)))
    figures_a, figures_b = (table.figures(whole)[0] for table in tables)
    draws = np.concatenate(
        [
            tables[1].figures(weights) - tables[0].figures(weights)
            for weights in resamples(len(a), num_resamples=num_resamples, seed=seed)
        ]
    )
    draws[np.abs(draws) < 1e-9] = 0.0  # equal runs differ by rounding, which must not count as a side of zero
    low, high = percentile_interval(draws)
    smaller_side = np.minimum((draws <= 0).sum(axis=0), (draws >= 0).sum(axis=0))
    p_values = np.minimum(1.0, 2.0 * (smaller_side + 1) / (num_resamples + 1))
    change = figures_b - figures_a
    columns = (figures_a, figures_b, change, low, high, p_values)
    return tuple(
        Difference(name, *(float(column[i]) for column in columns)) for i, name in enumerate(METRICS)
    )
