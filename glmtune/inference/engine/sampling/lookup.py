"""Drafts of the next tokens, from what stands in the prompt and the answer already.

Answers repeat their prompts (summaries, code that is changed, quotations) and themselves. So the tokens that
followed the last ones earlier are a draft of what follows now; the engine reads them all at once and keeps
those that it would have chosen anyway. A wrong draft costs its share of that step, but no answer changes.

Source:
    Prompt lookup decoding, A. Saxena 2023 (n-grams of the prompt instead of a draft model).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SIZES = (4, 3, 2)
"""Lengths of the runs of tokens that are looked up, the longer first. A run of one token says too little:
most drafts would be wrong, and every token of them is computed."""
_TOKEN_BITS = 20  # of an id in a key; vocabularies have up to 151,552


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may follow.

    Attributes:
        token_ids: at least one.
        num_matched: length of the run before them that stood somewhere earlier, one of `SIZES`; 0 where a
            model drafted.
    """

    token_ids: tuple[int, ...]
    num_matched: int


class TokenLookup:
    """The tokens of a request, and where each run of a few of them stood last."""

    # A run is entered only once the token behind it is known, so a look-up never finds the end itself. Runs
    # are keyed by one whole number, which takes a third of the memory of a tuple.

    def __init__(self, token_ids: Iterable[int] = ()) -> None:
        """Start with the tokens of a prompt."""
        self._tokens: list[int] = []
        self._after: tuple[dict[int, int], ...] = tuple({} for _ in SIZES)
        for token_id in token_ids:
            self.add(token_id)

    def __len__(self) -> int:
        """Number of tokens known."""
        return len(self._tokens)

    def add(self, token_id: int) -> None:
        """Take the next token, in a time that does not depend on how many there are."""
        for size, after in zip(SIZES, self._after, strict=True):
            if len(self._tokens) >= size:
                after[_key(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token_id)

    @property
    def end(self) -> tuple[int, ...]:
        """The last tokens, as many as are ever looked up."""
        return tuple(self._tokens[-SIZES[0] :])

    def propose(self, max_tokens: int) -> Draft | None:
        """Return what followed the last tokens where they stood before; None where they never did.

        Args:
            max_tokens: most tokens to return, at least 1.
        """
        size, place = self._find(self._tokens)
        return None if place < 0 else Draft(self._copied(place, max_tokens), size)

    def propose_behind(self, last: Sequence[int], max_tokens: int) -> Draft | None:
        """Return what followed tokens of another text where they stood in this one; None: nowhere.

        Args:
            last: the end of the other text (`end`).
            max_tokens: most tokens to return, at least 1.
        """
        size, place = self._find(last)
        return None if place < 0 else Draft(tuple(self._tokens[place : place + max_tokens]), size)

    def _find(self, last: Sequence[int]) -> tuple[int, int]:
        """Return how many of the last tokens stand here, and where what follows them does; -1: nowhere."""
        for size, after in zip(SIZES, self._after, strict=True):
            place = after.get(_key(last[-size:])) if len(last) >= size else None
            if place is not None:
                return size, place
        return 0, -1

    def _copied(self, place: int, num: int) -> tuple[int, ...]:
        # Where the earlier place is so near that its continuation reaches the end, the draft goes on with
        # itself: the repetition of a repetition.
        draft: list[int] = []
        for offset in range(place, place + num):
            known = offset - len(self._tokens)
            draft.append(self._tokens[offset] if known < 0 else draft[known])
        return tuple(draft)


def _key(run: Sequence[int]) -> int:
    key = 0
    for token_id in run:
        key = (key << _TOKEN_BITS) | token_id
    return key
