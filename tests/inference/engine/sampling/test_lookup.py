"""Guesses are what followed the last tokens where they stood before."""

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
                guess: list[int] = []
                while len(guess) < num:
                    guess.append(([*tokens, *guess])[start + size + len(guess)])
                return tuple(guess)
    return ()


@pytest.mark.parametrize("seed", range(20))
def test_guesses_are_those_of_a_search(seed: int):
    rng = random.Random(seed)
    tokens = rng.choices([0, 1, 151_551, 5], k=60)
    lookup = TokenLookup(tokens[:20])
    for place in range(20, len(tokens)):
        assert lookup.propose(6) == searched(tokens[:place], 6)
        lookup.add(tokens[place])
    assert len(lookup) == 60


def test_nothing_is_guessed_without_a_repetition():
    assert TokenLookup(range(100)).propose(5) == ()
    assert TokenLookup().propose(5) == ()
    assert TokenLookup([1]).propose(5) == ()
    assert TokenLookup([1, 2, 1, 2]).propose(0) == ()


def test_longer_runs_and_later_places_come_first():
    assert TokenLookup([1, 2, 3, 7, 2, 3, 8, 1, 2, 3]).propose(1) == (7,)
    assert TokenLookup([2, 3, 7, 2, 3, 8, 2, 3]).propose(2) == (8, 2)


def test_a_repetition_goes_on():
    assert TokenLookup([1, 2, 3, 1, 2, 3]).propose(7) == (1, 2, 3, 1, 2, 3, 1)
    assert TokenLookup([4, 4, 4]).propose(3) == (4, 4, 4)
