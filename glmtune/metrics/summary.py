"""Scores of a whole file: means, corpus BLEU, and the bootstrap intervals around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glmtune.metrics.text import MAX_ORDER, METRICS, ROW_METRICS, RowScores

NUM_RESAMPLES = 2000
"""Draws of the bootstrap: the ends of an interval then move by some hundredths of its width between seeds."""
CONFIDENCE = 0.95
_CELLS_AT_ONCE = 4_000_000
"""Weights formed at a time, 32 MB: all draws of 100,000 rows at once would be 1.6 GB."""


@dataclass(frozen=True, slots=True)
class ScoreEstimate:
    """A figure with its interval.

    Attributes:
        value: the figure over all rows, 0 to 100.
        low: lower end of the 95 % percentile bootstrap interval over rows.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TextReport:
    """What a file of predictions scores.

    Attributes:
        estimates: one per name in ``METRICS``, in that order.
        num_rows: rows scored, empty ones included.
        num_empty_predictions: rows where nothing was generated (they score 0).
        num_empty_references: rows with nothing to compare with (they score 0).
    """

    estimates: tuple[ScoreEstimate, ...]
    num_rows: int
    num_empty_predictions: int
    num_empty_references: int

    def __getitem__(self, name: str) -> ScoreEstimate:
        """Return the estimate of a metric, by its name in ``METRICS``."""
        return self.estimates[list(METRICS).index(name)]

    def to_json(self) -> dict[str, object]:
        """Return plain values for a metrics file, each figure with its signature."""
        return {
            "num_rows": self.num_rows,
            "num_empty_predictions": self.num_empty_predictions,
            "num_empty_references": self.num_empty_references,
            "interval": f"{CONFIDENCE:.0%} percentile bootstrap over rows, {NUM_RESAMPLES} resamples",
            "metrics": {
                name: {
                    "value": round(estimate.value, 4),
                    "low": round(estimate.low, 4),
                    "high": round(estimate.high, 4),
                    "protocol": METRICS[name].protocol,
                    "signature": METRICS[name].describe(),
                }
                for name, estimate in zip(METRICS, self.estimates, strict=True)
            },
        }


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Row scores as arrays, ready to be resampled.

    Attributes:
        values: float64 ``[rows, len(ROW_METRICS)]``, 0 to 100.
        bleu_counts: float64 ``[rows, 10]``, see ``RowScores.bleu_counts``.
    """

    values: NDArray[np.float64]
    bleu_counts: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Sequence[RowScores]) -> ScoreTable:
        """Stack row scores."""
        return cls(
            np.array([row.values for row in rows], dtype=np.float64),
            np.array([row.bleu_counts for row in rows], dtype=np.float64),
        )

    def figures(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return every metric with each row counted as often as a weight says.

        Args:
            weights: float64 ``[resamples, rows]``, counts that sum to the number of rows.

        Returns:
            float64 ``[resamples, len(METRICS)]``, 0 to 100, in the order of ``METRICS``.
        """
        # A draw is a row of counts, so a resample is a matrix product. Corpus BLEU is no mean of rows: its
        # n-gram counts are summed first.
        means = weights @ self.values / len(self.values)
        corpus = corpus_bleu(weights @ self.bleu_counts)
        columns = {**dict(zip(ROW_METRICS, means.T, strict=True)), "corpus-bleu-4": corpus}
        return np.stack([columns[name] for name in METRICS], axis=1)


def corpus_bleu(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute BLEU-4 without smoothing from summed n-gram counts.

    Args:
        counts: float64 ``[..., 10]``, sums over rows of ``RowScores.bleu_counts``.

    Returns:
        float64 ``[...]``, 0 to 100; 0 where some order has no match.

    Source:
        Papineni et al. 2002, section 2.3; the counts are those of ``nltk.translate.bleu_score.corpus_bleu``.
    """
    matches, totals = counts[..., :MAX_ORDER], counts[..., MAX_ORDER : 2 * MAX_ORDER]
    num_predicted, num_wanted = counts[..., -2], counts[..., -1]
    # Where an order has no match, or a text no n-gram of it, these are no numbers: 0 in the last line.
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.log(matches / totals).mean(axis=-1))
        brevity = np.exp(np.minimum(0.0, 1.0 - num_wanted / num_predicted))
    return np.where((matches > 0).all(axis=-1), 100.0 * brevity * precision, 0.0)


def resamples(num_rows: int, *, num_resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield bootstrap weights in blocks of bounded size.

    Args:
        num_rows: rows to draw from, with replacement.
        num_resamples: how many draws in all.
        seed: the same seed gives the same draws, whatever is scored.

    Yields:
        float64 ``[block, num_rows]``, how often each row was drawn.
    """
    generator = np.random.default_rng(seed)
    chances = np.full(num_rows, 1.0 / num_rows)
    block = max(1, _CELLS_AT_ONCE // num_rows)
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        yield generator.multinomial(num_rows, chances, size=size).astype(np.float64)


def percentile_interval(draws: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the ends of the central 95 % of ``draws`` (``[resamples, ...]``) along the first axis."""
    tail = 50.0 * (1.0 - CONFIDENCE)
    low, high = np.percentile(draws, [tail, 100.0 - tail], axis=0)
    return low, high


def summarize(rows: Sequence[RowScores], *, seed: int = 0) -> TextReport:
    """Score a file from the scores of its rows.

    Args:
        rows: at least one.
        seed: of the bootstrap.

    Returns:
        Every metric with its interval. One row alone gives an interval without width.
    """
    assert rows, "callers refuse a file without rows"
    table = ScoreTable.of(rows)
    values = table.figures(np.ones((1, len(rows))))[0]
    draws = [
        table.figures(weights) for weights in resamples(len(rows), num_resamples=NUM_RESAMPLES, seed=seed)
    ]
    lows, highs = percentile_interval(np.concatenate(draws))
    ends = zip(values.tolist(), lows.tolist(), highs.tolist(), strict=True)
    return TextReport(
        estimates=tuple(ScoreEstimate(*end) for end in ends),
        num_rows=len(rows),
        num_empty_predictions=sum(row.is_prediction_empty for row in rows),
        num_empty_references=sum(row.is_reference_empty for row in rows),
    )
