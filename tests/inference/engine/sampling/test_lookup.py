"""Drafts are what followed the last tokens where they stood before."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from glmtune.inference.engine.sampling.lookup import SIZES, TokenLookup


def searched(tokens: Sequence[int], num: int) -> tuple[int, ...]:
    """The same by searching backwards through all tokens."""
    for size in SIZES:
        end = list(tokens[-size:])
        for start in range(len(tokens) - size - 1, -1, -1):
            if list(tokens[start : start + size]) == end and len(end) == size:
                draft: list[int] = []
                while len(draft) < num:
                    draft.append(([*tokens, *draft])[start + size + len(draft)])
                return tuple(draft)
    return ()


@pytest.mark.parametrize("seed", range(20))
def test_drafts_are_those_of_a_search(seed: int):
    rng = random.Random(seed)
    tokens = rng.choices([0, 1, 151_551, 5], k=60)
    lookup = TokenLookup(tokens[:20])
    for place in range(20, len(tokens)):
        assert ids(lookup, 6) == searched(tokens[:place], 6)
        lookup.add(tokens[place])
    assert len(lookup) == 60


def ids(lookup: TokenLookup, most: int) -> tuple[int, ...]:
    draft = lookup.propose(most)
    return () if draft is None else draft.token_ids


def test_nothing_is_drafted_without_a_repetition():
    assert TokenLookup(range(100)).propose(5) is None
    assert TokenLookup().propose(5) is None
    assert TokenLookup([1]).propose(5) is None


def test_longer_runs_and_later_places_come_first():
    assert ids(TokenLookup([1, 2, 3, 7, 2, 3, 8, 1, 2, 3]), 1) == (7,)
    assert ids(TokenLookup([2, 3, 7, 2, 3, 8, 2, 3]), 2) == (8, 2)


def test_other_texts_are_continued_as_far_as_this_one_goes():
    lookup = TokenLookup([1, 2, 3, 4, 5, 6])
    for last, most, expected in (
        ([9, 2, 3], 2, ((4, 5), 2)),
        ([2, 3, 4], 9, ((5, 6), 3)),
        ([7, 1, 2, 3, 4], 1, ((5,), 4)),
    ):
        draft = lookup.propose_behind(last, most)
        assert draft is not None
        assert (draft.token_ids, draft.num_matched) == expected
    for last in ([5, 6], [6], [], [3, 2]):
        assert lookup.propose_behind(last, 5) is None
    assert lookup.end == (3, 4, 5, 6)


def test_how_long_a_run_was_found_is_told():
    for tokens, num_matched in (
        ([1, 2, 3, 7, 1, 2, 3], 3),
        ([0, 1, 2, 3, 7, 0, 1, 2, 3], 4),
        ([9, 2, 3, 7, 1, 2, 3], 2),
    ):
        draft = TokenLookup(tokens).propose(1)
        assert draft is not None
        assert (draft.token_ids, draft.num_matched) == ((7,), num_matched)


def test_a_repetition_goes_on():
    assert ids(TokenLookup([1, 2, 3, 1, 2, 3]), 7) == (1, 2, 3, 1, 2, 3, 1)
    assert ids(TokenLookup([4, 4, 4]), 3) == (4, 4, 4)
