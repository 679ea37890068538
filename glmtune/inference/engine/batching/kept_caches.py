"""Keys and values of finished or running requests, for those that begin with the same tokens.

The next question of a conversation begins with all that was said before; requests of one application begin
with its system message. What an earlier request read (and generated) of that need not be read again. The
cache that served nobody for longest goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glmtune.inference.engine.attention import KeysValues
from glmtune.inference.engine.batching.row import Row
from glmtune.inference.engine.prompt_groups import common_length
from glmtune.memory import is_out_of_memory

MIN_REUSED_TOKENS = 16
"""Less is read again: attention behind a cache costs a mask, and every prompt of a release begins alike."""

MIN_LED_TOKENS = 64
"""Less is read again by rows that come together: reading them side by side takes less than waiting."""


def find_leader(row: Row, others: Sequence[Row]) -> None:
    """Let a row wait for one that reads, or has read, more of its first tokens than are held for it.

    Sixteen requests with one long system message that come together read it once: the others go on from what
    the first one has read. Who leads came before, so that no two rows wait for each other.

    Args:
        row: which has read ``num_read`` tokens; mutated.
        others: the rows before it that are read or run.
    """
    own, key = row.own, row.adapter.cache_key
    row.leader, row.num_common = None, max(row.num_read, MIN_LED_TOKENS - 1)
    for other in others:
        if other.adapter.cache_key != key or other.is_damaged:
            continue
        theirs = other.own
        # One token is left to read; and of a running row the last one is read with the next step only.
        common = min(common_length(theirs, own), len(own) - 1, len(theirs) - 1)
        if common > row.num_common:
            row.leader, row.num_common = other, common


@dataclass(frozen=True, slots=True)
class _Kept:
    key: str
    token_ids: tuple[int, ...]
    layers: tuple[KeysValues, ...]


class KeptCaches:
    """The caches, the one that was used last at the end."""

    def __init__(self) -> None:
        """Start empty."""
        self._kept: list[_Kept] = []

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return sum(len(each.token_ids) for each in self._kept)

    def find(self, key: str, token_ids: Sequence[int]) -> tuple[int, tuple[KeysValues, ...]]:
        """Return how many first tokens are held, and their keys and values (views, each ``[1, K, S, H]``).

        At least one token is left to read: what follows is told by its hidden state, which is not kept.

        Args:
            key: see `RowAdapter`.
            token_ids: of the prompt.
        """
        best, length = None, MIN_REUSED_TOKENS - 1
        for kept in self._kept:
            if kept.key == key and (shared := common_length(kept.token_ids, token_ids)) > length:
                best, length = kept, shared
        length = min(length, len(token_ids) - 1)
        if best is None or length < MIN_REUSED_TOKENS:
            return 0, ()
        self._kept.remove(best)
        self._kept.append(best)
        return length, tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in best.layers)

    def holds(self, key: str, token_ids: Sequence[int]) -> bool:
        """Whether all of these tokens are held: keeping them again would gain nothing."""
        return any(
            kept.key == key and common_length(kept.token_ids, token_ids) == len(token_ids)
            for kept in self._kept
        )

    def put(
        self, key: str, token_ids: tuple[int, ...], layers: Sequence[KeysValues], *, max_tokens: int
    ) -> None:
        """Keep the tokens of a request, in place of what they begin with.

        Args:
            key: see `RowAdapter`.
            token_ids: all that were read.
            layers: their keys and values, in memory of their own.
            max_tokens: how many tokens may be held; older caches go.
        """
        self._kept = [
            kept
            for kept in self._kept
            if kept.key != key or common_length(kept.token_ids, token_ids) < len(kept.token_ids)
        ]
        self._kept.append(_Kept(key, token_ids, tuple(layers)))
        self.shrink(max_tokens)

    def shrink(self, max_tokens: int) -> None:
        """Let go of caches until at most this many tokens are held."""
        held = self.num_tokens
        while self._kept and held > max_tokens:
            held -= len(self._kept.pop(0).token_ids)


def copied(layers: Sequence[KeysValues]) -> tuple[KeysValues, ...]:
    """Return keys and values in memory of their own."""
    return tuple((keys.clone(), values.clone()) for keys, values in layers)


def copy_if_room(copy: Callable[[], tuple[KeysValues, ...]]) -> tuple[KeysValues, ...]:
    """Return a copy of keys and values; nothing where memory does not suffice."""
    try:
        return copy()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return ()
