"""The keys and values of a generating batch: a slot per row, shared prompts of several rows held once.

::

                                         own tokens, one column each
    shared prompt of group 0   <-  slot 0   q q q a a a .        q question, a answer,
    [.....................]    <-  slot 1   q q a a a a a .      . column of the next token
    shared prompt of group 1   <-  slot 2   q q q q a .
    [...........]                  slot 3   (empty)

A row attends to its shared prompt and to its own columns separately, and the two results are merged. With
``lse`` the log-sum-exp of the scores of a part, softmax over both parts is the mean of the parts' own
softmaxes with weights ``exp(lse_1 - lse)`` and ``exp(lse_2 - lse)``, ``lse`` that of both: exact, not an
approximation. So the queries of all rows meet the shared keys in one matrix product, and the shared keys
are read from memory once per step instead of once per row: decoding is bound by reading memory.

Shapes: B slots, N query heads, K key/value heads, G = N / K, C columns, P shared tokens, H head width.

Source:
    Juravsky et al. 2024, arXiv:2402.05099, section 3.1 (decomposed attention) and 3.2 (its batching).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glmtune.inference.engine.attention import KeysValues
from glmtune.inference.engine.prompt_groups import SharedPrompt
from glmtune.models.architectures.kv_cache import COLUMN_CHUNK, STATES, Int8States, PlainStates


@dataclass(frozen=True, slots=True)
class Segment:
    """A shared prompt and the slots whose rows begin with it; None: all of them (nothing to pick out)."""

    shared: SharedPrompt
    slots: Tensor | None


@dataclass(frozen=True, slots=True)
class _PartialAttention:
    """Attention over some of the keys, in float32.

    Attributes:
        mixed: values weighted by the softmax over these keys, ``[B, K, G, H]``.
        lse: natural log of the sum of the exponentiated scores, ``[B, K, G, 1]``.
    """

    mixed: Tensor
    lse: Tensor

    def merge(self, other: _PartialAttention) -> _PartialAttention:
        """Return the attention over the keys of both (see the module)."""
        lse = torch.logaddexp(self.lse, other.lse)
        mixed = self.mixed * (self.lse - lse).exp() + other.mixed * (other.lse - lse).exp()
        return _PartialAttention(mixed, lse)


class SlotStates:
    """Slots of a batch in which every row is at its own length.

    A row's own tokens lie in the first columns of its slot; a row that leaves is overwritten by the next one.

    Attributes:
        segments: the shared prompts.
    """

    def __init__(self, kv_cache: str = "plain") -> None:
        """Start without slots; the first rows put in decide their number.

        Args:
            kv_cache: how own keys and values are kept, one of `glmtune.models.settings.KV_CACHES`.
        """
        self.segments: list[Segment] = []
        self._states_class = STATES[kv_cache]
        self._layers: list[tuple[PlainStates | Int8States, PlainStates | Int8States]] = []
        self._lengths = torch.zeros(0, dtype=torch.long)
        self._taken = torch.zeros(0, dtype=torch.long)  # 1 where a row sits: what `advance` adds
        self._columns = 0  # that any row needs in this step
        self._mask = torch.zeros(0)

    @property
    def num_slots(self) -> int:
        """Number of slots, B."""
        return len(self._lengths)

    def put(self, slots: Sequence[int], layers: Sequence[KeysValues], lengths: Tensor) -> None:
        """Put rows that were just read into slots, new slots included.

        What an earlier row left in a slot behind the new one's columns is never seen: `open_column` hides it.

        Args:
            slots: where to put each row.
            layers: keys and values per layer, each ``[rows, K, S, H]``; columns from a row's length on are
                ignored.
            lengths: int64 ``[rows]``.
        """
        places = torch.tensor(slots, dtype=torch.long, device=lengths.device)
        width, num_slots = layers[0][0].shape[2], max(self.num_slots, max(slots) + 1)
        if not self._layers:
            self._layers = [
                (self._states_class.empty(keys), self._states_class.empty(values)) for keys, values in layers
            ]
        self._reserve(num_slots, width + 1)
        where = (places, slice(None), slice(0, width))
        for (keys, values), (new_keys, new_values) in zip(self._layers, layers, strict=True):
            keys.write(where, new_keys)
            values.write(where, new_values)
        # Last, so that a lack of memory above leaves the slots as they were.
        more = (0, num_slots - self.num_slots)
        self._lengths = nn.functional.pad(self._lengths.to(lengths.device), more)
        self._taken = nn.functional.pad(self._taken.to(lengths.device), more)
        self._lengths[places], self._taken[places] = lengths, 1

    def free(self, slots: Sequence[int]) -> None:
        """Empty slots; they stay in the batch until they are filled or dropped.

        Taking them out at once would copy the keys and values of all others.
        """
        places = torch.tensor(slots, dtype=torch.long, device=self._lengths.device)
        self._lengths[places], self._taken[places] = 0, 0

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all slots but these, which take the numbers 0, 1, ... in this order."""
        chosen = torch.tensor(slots, dtype=torch.long, device=self._lengths.device)
        lengths = self._lengths[chosen]
        width = int(lengths.max()) + 1  # with room for the next token
        # Whole before it takes the old one's place: a lack of memory leaves the slots as they were.
        kept = [(keys.picked(chosen, width), values.picked(chosen, width)) for keys, values in self._layers]
        self._layers, self._lengths, self._taken = kept, lengths, self._taken[chosen]

    def open_column(self) -> Tensor:
        """Make room for one more token per slot.

        Returns:
            Additive mask ``[B, 1, 1, C]`` over the own columns, the new token's included.
        """
        self._columns = int(self._lengths.max()) + 1
        self._reserve(self.num_slots, self._columns)
        column = torch.arange(self._columns, device=self._lengths.device)
        # The new token's column is seen too. So an empty slot, of length 0, sees column 0: a softmax over
        # nothing would be NaN.
        hidden = column[None] > self._lengths[:, None]
        mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)
        self._mask = mask[:, None, None]
        return self._mask

    def advance(self) -> None:
        """Count the token that was just read; until then a step can be repeated, over the same columns."""
        self._lengths += self._taken

    def attend(
        self,
        layer: int,
        query: Tensor,
        own: KeysValues,
        *,
        mask: Tensor | None,
        prefix: KeysValues | None,
        scaling: float,
    ) -> Tensor:
        """Attend with one query per slot; see `AttentionStates`."""
        del mask  # the model hands our own mask back, in its type
        held = self._layers[layer]
        column_B1 = self._lengths[:, None]
        rows_B1 = torch.arange(self.num_slots, device=column_B1.device)[:, None]
        heads_1K = torch.arange(own[0].shape[1], device=column_B1.device)[None]
        for states, new in zip(held, own, strict=True):
            states.write((rows_B1, heads_1K, column_B1), new[:, :, 0])
        keys, values = (states.read(self.num_slots, self._columns) for states in held)
        query_BKGH = query.unflatten(1, (keys.shape[1], -1)).squeeze(3)
        part = _attend(query_BKGH, keys, values, scaling, self._mask)
        if prefix is not None:  # the same for all rows
            part = part.merge(_attend_shared(query_BKGH, (prefix[0][:1], prefix[1][:1]), scaling))
        for segment in self.segments:
            part = _merge_segment(part, query_BKGH, segment, layer, scaling)
        return part.mixed.to(query.dtype).flatten(1, 2)[:, None]

    def _reserve(self, num_slots: int, num_columns: int) -> None:
        """Grow the slots to at least this many, with at least this many columns.

        Layer by layer, so that no more than one layer is there twice. Where memory ends in between, the
        layers that grew are merely larger than needed. A quarter more than asked for each time, so that a
        token is copied a few times in all and not once per step.
        """
        for place, (keys, values) in enumerate(self._layers):
            rows, room = keys.room
            if num_slots > rows or num_columns > room:
                wanted = room if num_columns <= room else num_columns + max(COLUMN_CHUNK, num_columns // 4)
                self._layers[place] = (keys.grown(num_slots, wanted), values.grown(num_slots, wanted))


def _attend(
    query_BKGH: Tensor, keys_BKCH: Tensor, values_BKCH: Tensor, scaling: float, mask: Tensor | None = None
) -> _PartialAttention:
    scores = (query_BKGH @ keys_BKCH.transpose(2, 3)).float() * scaling
    if mask is not None:
        scores = scores + mask
    # Written out, as PyTorch's fused attention does not return the log-sum-exp.
    lse = scores.logsumexp(dim=-1, keepdim=True)
    return _PartialAttention(((scores - lse).exp().to(values_BKCH.dtype) @ values_BKCH).float(), lse)


def _attend_shared(query_BKGH: Tensor, shared: KeysValues, scaling: float) -> _PartialAttention:
    """Attend to keys and values ``[1, K, P, H]`` that all rows share: one matrix product per head.

    The queries of all rows stand in one matrix, as if they were B * G queries of a single row.
    """
    size, groups = query_BKGH.shape[0], query_BKGH.shape[2]
    query_1KQH = query_BKGH.transpose(0, 1).flatten(1, 2)[None]
    part = _attend(query_1KQH, shared[0].to(query_BKGH), shared[1].to(query_BKGH), scaling)
    unpacked = [tensor[0].unflatten(1, (size, groups)).transpose(0, 1) for tensor in (part.mixed, part.lse)]
    return _PartialAttention(*unpacked)


def _merge_segment(
    part: _PartialAttention, query_BKGH: Tensor, segment: Segment, layer: int, scaling: float
) -> _PartialAttention:
    """Add what the rows of a segment see in its shared prompt; the others stay as they are."""
    states, slots = segment.shared.layers[layer], segment.slots
    if slots is None:
        return part.merge(_attend_shared(query_BKGH, states, scaling))
    mine = _PartialAttention(part.mixed[slots], part.lse[slots])
    merged = mine.merge(_attend_shared(query_BKGH[slots], states, scaling))
    part.mixed[slots], part.lse[slots] = merged.mixed, merged.lse
    return part
