"""Prompts that begin alike: which of them to read together, and the part they share.

The few-shot prompts of a subject are hundreds of tokens of the same examples and then one question. The
examples are read once, as the *shared prompt* of a group. (They are not called a prefix: in this program
that is P-Tuning's.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, count, pairwise
from operator import ne

from torch import Tensor

TokenIds = Sequence[int]
LayerStates = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of every layer, each ``[B, K, S, H]``."""


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """Prompts whose first tokens are read once.

    Attributes:
        num_shared: how many first tokens they share; at least one token of every prompt is left over.
        members: places of the prompts, longest first.
    """

    num_shared: int
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SharedPrompt:
    """First tokens of several prompts, read once, and what every layer's attention keeps of them.

    Attributes:
        token_ids: the tokens.
        layers: rotated keys and values, each ``[1, K, P, H]``; empty where there are no tokens.
    """

    token_ids: tuple[int, ...] = ()
    layers: LayerStates = ()


def common_length(first: TokenIds, second: TokenIds) -> int:
    """Count the tokens with which both begin.

    >>> common_length([5, 6, 7], [5, 6, 8, 9])
    2
    """
    # A loop without Python code in it: it runs once per prompt of a benchmark, over hundreds of tokens.
    return next(compress(count(), map(ne, first, second)), min(len(first), len(second)))


def group_prompts(prompts: Sequence[tuple[int, ...]], *, min_gain: int) -> list[PromptGroup]:
    """Group prompts by their common first tokens.

    The prompts form a tree by their first tokens. A branch becomes a group of its own where reading its
    common part once spares enough; what branches off too little stays with the group above it::

        [gMASK] sop ── examples of law ──┬─ question 1
                    │                    └─ question 2       group: "[gMASK] sop, examples of law"
                    └─ examples of art ──┬─ question 3
                                         └─ question 4       group: "[gMASK] sop, examples of art"

    Sorted prompts are the leaves of that tree in order, so a branch is a run of neighbours, and what the
    run shares is the least of what neighbours share: no tree is built.

    Args:
        prompts: token ids, none empty.
        min_gain: tokens that a group must spare.

    Returns:
        Groups that hold every prompt once, ordered so that a shared prompt follows those it begins with
        (which is what `PromptCache` keeps).
    """
    order = sorted(range(len(prompts)), key=lambda place: prompts[place])
    ordered = [prompts[place] for place in order]
    shared = [common_length(first, second) for first, second in pairwise(ordered)]
    groups: list[PromptGroup] = []
    waiting = [(0, len(order), 0)] if order else []  # branches: first and last leaf, tokens shared above
    while waiting:  # a stack, not recursion: a branch may be as deep as there are prompts
        start, end, above = waiting.pop()
        common = _common(ordered, shared, start, end)
        # One prompt reads the common tokens anyway; the others of the branch are spared them.
        length = common if (end - start - 1) * (common - above) >= min_gain else above
        members: list[int] = []
        for left, right in _branches(shared, start, end, common):
            spared = (right - left - 1) * (_common(ordered, shared, left, right) - length)
            if spared >= min_gain:
                waiting.append((left, right, length))
            else:
                members += order[left:right]
        if members:
            members.sort(key=lambda place: (-len(prompts[place]), place))
            groups.append(PromptGroup(length, tuple(members)))
    return groups


def _common(ordered: Sequence[TokenIds], shared: Sequence[int], start: int, end: int) -> int:
    """Count the tokens that sorted prompts share, leaving one over of each: its hidden state is needed."""
    return min([len(prompt) - 1 for prompt in ordered[start:end]] + list(shared[start : end - 1]))


def _branches(shared: Sequence[int], start: int, end: int, length: int) -> Iterator[tuple[int, int]]:
    """Split sorted prompts where neighbours share no more than ``length`` tokens."""
    left = start
    for place in range(start, end - 1):
        if shared[place] <= length:
            yield left, place + 1
            left = place + 1
    if left < end:
        yield left, end
