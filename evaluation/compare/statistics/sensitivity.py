"""What moved before accuracy does: choice probabilities, margins, the place where greedy texts part.

An accuracy changes only where an answer flips. A small model that guesses loses nothing by quantization and
moves its probabilities all the same; a good one flips where its margin was small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.compare.pairing.match import Pair
from evaluation.compare.pairing.runs import JudgedAnswer

NUM_BINS = 10
"""Of a tenth each: flips sit at margins below 0.1, and a bin holds 135 of 1,346 questions on average."""
FLOOR = 1e-12
"""Smallest probability in a Kullback-Leibler divergence; servers leave improbable choices out."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and quantiles of a figure that every question has.

    Attributes:
        mean: of all.
        median: of all.
        p95: 95 of 100 are not above it.
        largest: of all.
    """

    mean: float
    median: float
    p95: float
    largest: float


@dataclass(frozen=True, slots=True)
class MarginBin:
    """Questions whose baseline margin lies in one range.

    Attributes:
        low: from this margin on.
        high: up to this one, which is in the last bin only.
        num_samples: questions in it.
        num_candidate: questions whose margin in the candidate lies in this range.
        num_changed: questions whose most probable choice changed.
        num_lost: right in the baseline alone.
        num_gained: right in the candidate alone.
    """

    low: float
    high: float
    num_samples: int
    num_candidate: int
    num_changed: int
    num_lost: int
    num_gained: int


@dataclass(frozen=True, slots=True)
class ChoiceShift:
    """How far the probabilities of the choices moved; each question's are normalised to sum to 1.

    Attributes:
        num_samples: questions that have probabilities in both runs.
        js_nats: Jensen-Shannon divergence per question, 0 to ln 2.
        kl_nats: Kullback-Leibler divergence of the candidate from the baseline.
        num_changed: questions whose most probable choice changed.
        mean_margin_baseline: mean of best minus second-best probability.
        mean_margin_candidate: the same.
        margins: histogram over the baseline's margin.
    """

    num_samples: int
    js_nats: Spread
    kl_nats: Spread
    num_changed: int
    mean_margin_baseline: float
    mean_margin_candidate: float
    margins: tuple[MarginBin, ...]


@dataclass(frozen=True, slots=True)
class TextShift:
    """Where greedy completions part.

    Attributes:
        num_samples: questions with a completion in both runs.
        num_identical: completions that are the same, character by character.
        num_same_answer: differing completions from which the same answer was read.
        first_quartile_chars: a quarter of the differing ones part before this character, from 0.
        median_chars: half of them.
        third_quartile_chars: three quarters; all three are None where none differs.
        median_length_chars: length of the baseline's differing completions.
    """

    num_samples: int
    num_identical: int
    num_same_answer: int
    first_quartile_chars: float | None
    median_chars: float | None
    third_quartile_chars: float | None
    median_length_chars: float | None


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What moved between two runs; a part is None where the protocol has no choices, or no completions.

    Attributes:
        choices: shift of choice probabilities.
        texts: divergence of completions.
    """

    choices: ChoiceShift | None
    texts: TextShift | None


def measure(pair: Pair) -> Sensitivity:
    """Measure what moved from the answers alone; no model is needed.

    Args:
        pair: two runs on the same questions.
    """
    scored = [rows for rows in pair.rows if all(row.answer.choice_logprobs is not None for row in rows)]
    written = [rows for rows in pair.rows if all(row.answer.completion is not None for row in rows)]
    return Sensitivity(
        choices=_choice_shift(scored) if scored else None,
        texts=_text_shift(written, pair) if written else None,
    )


def _choice_shift(rows: Sequence[tuple[JudgedAnswer, JudgedAnswer]]) -> ChoiceShift:
    import numpy as np
    from scipy.special import rel_entr, softmax

    # Log-probabilities are over the whole vocabulary: softmax makes those of the choices sum to 1.
    logprobs = np.array([[row.answer.choice_logprobs for row in pair] for pair in rows], dtype=float)
    probabilities = softmax(np.maximum(logprobs, np.log(FLOOR)), axis=2)  # [questions, 2, choices]
    before, after = probabilities[:, 0], probabilities[:, 1]
    middle = (before + after) / 2
    js_nats = (rel_entr(before, middle) + rel_entr(after, middle)).sum(axis=1) / 2
    kl_nats = rel_entr(before, after).sum(axis=1)
    ordered = np.sort(probabilities, axis=2)
    margins = ordered[:, :, -1] - ordered[:, :, -2]
    changed = logprobs[:, 0].argmax(axis=1) != logprobs[:, 1].argmax(axis=1)
    right = np.array([[row.status == "correct" for row in pair] for pair in rows])
    lost, gained = right[:, 0] & ~right[:, 1], ~right[:, 0] & right[:, 1]
    # A margin of exactly 1 belongs into the last bin.
    place = np.minimum((margins * NUM_BINS).astype(int), NUM_BINS - 1)
    bins = [
        MarginBin(
            low=number / NUM_BINS,
            high=(number + 1) / NUM_BINS,
            num_samples=int((place[:, 0] == number).sum()),
            num_candidate=int((place[:, 1] == number).sum()),
            num_changed=int(changed[place[:, 0] == number].sum()),
            num_lost=int(lost[place[:, 0] == number].sum()),
            num_gained=int(gained[place[:, 0] == number].sum()),
        )
        for number in range(NUM_BINS)
    ]
    return ChoiceShift(
        num_samples=len(rows),
        js_nats=_spread(js_nats),
        kl_nats=_spread(kl_nats),
        num_changed=int(changed.sum()),
        mean_margin_baseline=float(margins[:, 0].mean()),
        mean_margin_candidate=float(margins[:, 1].mean()),
        margins=tuple(bins),
    )


def _spread(values: object) -> Spread:
    import numpy as np

    found = np.maximum(np.asarray(values, dtype=float), 0.0)  # rounding can leave -1e-17
    median, p95 = np.percentile(found, [50, 95])
    return Spread(float(found.mean()), float(median), float(p95), float(found.max()))


def first_divergence(before: str, after: str) -> int | None:
    """Return the first character in which two texts differ, from 0; None where they are the same.

    >>> [first_divergence(*texts) for texts in (("3 + 4", "3 + 5"), ("so", "so it is"), ("a", "a"))]
    [4, 2, None]
    """
    if before == after:
        return None
    pairs = enumerate(zip(before, after, strict=False))
    shorter = min(len(before), len(after))
    return next((place for place, (one, other) in pairs if one != other), shorter)


def _text_shift(rows: Sequence[tuple[JudgedAnswer, JudgedAnswer]], pair: Pair) -> TextShift:
    import numpy as np

    # Greedy texts that part never meet again in a way that could be counted, so only the first difference
    # counts.
    differing = [
        (first_divergence(before.answer.completion or "", after.answer.completion or ""), before, after)
        for before, after in rows
        if before.answer.completion != after.answer.completion
    ]
    same_answer = sum(
        pair.baseline.extracted(before) == pair.candidate.extracted(after) for _, before, after in differing
    )
    if not differing:
        return TextShift(len(rows), len(rows), same_answer, None, None, None, None)
    places = [place or 0 for place, _, _ in differing]
    lower, median, upper = (float(value) for value in np.percentile(places, [25, 50, 75]))
    length = float(np.median([len(before.answer.completion or "") for _, before, _ in differing]))
    return TextShift(len(rows), len(rows) - len(differing), same_answer, lower, median, upper, length)
