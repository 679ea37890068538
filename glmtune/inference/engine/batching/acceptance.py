"""How often drafts are right, and so how long one is worth computing.

A token that is drafted in vain costs its share of a pass; one that is right saves a pass. With a chance p
that each token of a draft is right, the first k of it bring ``p + p² + ... + p^k`` tokens besides the one
that every pass brings. So a draft is cut where tokens per time are most, and left out where that is nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence

BY_MODEL = 0
"""Stands for the length of a run where a model drafted."""
EXPECTED = {4: 0.7, 3: 0.5, 2: 0.2, BY_MODEL: 0.7}
"""Chance of a token of a draft by the length of the run that was found, before a request has tried any: about
what worked problems and advertisements have (``benchmarks/prompt_lookup.py``)."""
WEIGHT = 2.0
"""How many observed tokens the expectation counts as."""
KEEP = 0.85
"""What earlier observations count after a further one: texts change from new to repeated and back."""
FORGET = 0.98
"""The same after a step without a draft, so that a request whose drafts were wrong tries again some day."""


class AcceptanceRates:
    """How often the tokens drafted for one request were right, lately."""

    def __init__(self) -> None:
        """Start with what is expected of any request."""
        self._right = dict.fromkeys(EXPECTED, 0.0)
        self._seen = dict.fromkeys(EXPECTED, 0.0)

    def rate(self, num_matched: int) -> float:
        """Return the chance that a token of a draft is right, those before it being right.

        Args:
            num_matched: length of the run that the draft continues.
        """
        right, seen = self._right[num_matched], self._seen[num_matched]
        return (right + WEIGHT * EXPECTED[num_matched]) / (seen + WEIGHT)

    def note(self, num_matched: int, num_drafted: int, num_accepted: int) -> None:
        """Take over what came of a draft; tokens behind the first wrong one tell nothing."""
        self._scale(num_matched, KEEP)
        self._right[num_matched] += num_accepted
        self._seen[num_matched] += min(num_accepted + 1, num_drafted)

    def skip(self, num_matched: int) -> None:
        """Take over that a draft was not computed."""
        self._scale(num_matched, FORGET)

    def _scale(self, num_matched: int, factor: float) -> None:
        self._right[num_matched] *= factor
        self._seen[num_matched] *= factor


def best_width(
    drafts: Sequence[tuple[int, float]],
    *,
    num_rows: int,
    token_cost: float,
    max_tokens: int,
    draft_cost: float = 0.0,
) -> int:
    """Return how many tokens of every row to read in a pass, 1 where drafts are not worth it.

    Args:
        drafts: length and chance (`AcceptanceRates.rate`) of those there are.
        num_rows: rows of the pass; each takes its width, with or without a draft.
        token_cost: what a further token in a pass costs, a pass with one token being 1.
        max_tokens: most tokens of a pass.
        draft_cost: what drafting a further token costs, for all rows together.

    >>> best_width([(7, 0.95)], num_rows=1, token_cost=0.15, max_tokens=64)
    8
    >>> best_width([(7, 0.5)], num_rows=1, token_cost=0.15, max_tokens=64)
    3
    >>> best_width([(7, 0.5)], num_rows=8, token_cost=0.15, max_tokens=64)
    1
    """
    best, most = 1, 0.0
    gained = 0.0
    for width in range(1, 2 + max((length for length, _ in drafts), default=0)):
        if width > 1:
            if width * num_rows > max_tokens:
                break
            gained += sum(rate ** (width - 1) for length, rate in drafts if length >= width - 1)
        value = (num_rows + gained) / (1 + token_cost * (width * num_rows - 1) + draft_cost * (width - 1))
        if value > most:
            best, most = width, value
    return best
