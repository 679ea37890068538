"""A bank: the keys and values of rows of about one length, a slot per row.

::

    slot 0   P P q q q a a a . .        P prefix, q question, a answer: the row's columns
    slot 1   q q q q a a . . . .        . of the tokens to come
    slot 2   P P P q a . . . . .
    slot 3   (room for another row: neither read nor computed)

The rows always stand in the first slots: where one leaves, the last takes its place. That copies one row,
about what attending to an empty slot would cost in three steps, and so there are no empty slots to compute.

Shapes: R slots, K key/value heads, C columns, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glmtune.inference.engine.attention import KeysValues
from glmtune.inference.engine.states.rows import NewRow, Row
from glmtune.models.architectures.kv_cache import COLUMN_CHUNK, STATES, Int8States, PlainStates

LayerSlots = tuple[PlainStates | Int8States, PlainStates | Int8States]


class Bank:
    """Rows of about one length.

    Attributes:
        rows: the row in each slot.
        layers: keys and values, with room for more rows and columns.
    """

    def __init__(self, layers: Sequence[LayerSlots]) -> None:
        """Start without rows; ``layers`` are states without memory, of the right kind and shape."""
        self.rows: list[Row] = []
        self.layers = list(layers)
        self._room = (0, 0)  # of the layer that has least

    @classmethod
    def like(cls, layers: Sequence[KeysValues], kv_cache: str) -> Bank:
        """Make a bank for rows with such keys and values."""
        kind = STATES[kv_cache]
        return cls([(kind.empty(keys), kind.empty(values)) for keys, values in layers])

    def sibling(self) -> Bank:
        """Return a bank of the same kind without rows or memory."""
        none = torch.zeros(0, dtype=torch.long)
        return Bank([(keys.picked(none, 0), values.picked(none, 0)) for keys, values in self.layers])

    # ---- sizes ----

    @property
    def columns(self) -> int:
        """Columns that the longest row has in use."""
        return max((row.columns for row in self.rows), default=0)

    @property
    def tensors(self) -> list[Tensor]:
        """All memory taken."""
        return [part for pair in self.layers for states in pair for part in states.parts]

    @property
    def room(self) -> int:
        """Columns there is memory for, of all slots together."""
        return self._room[0] * self._room[1]

    @property
    def is_roomy(self) -> bool:
        """Whether less than half of the memory is in use, and not because little is in use at all."""
        slots, columns = self._room
        return 2 * len(self.rows) < slots or 2 * (self.columns + COLUMN_CHUNK) < columns

    # ---- memory ----

    def reserve(self, num_rows: int, num_columns: int, most_columns: int = 0) -> None:
        """Make room for at least so many rows of so many columns.

        Layer by layer, so that no more than one layer is there twice. Where memory ends in between, the
        layers that grew are merely larger than needed. A quarter more than asked for each time, so that a
        token is copied a few times in all and not once per step.

        Args:
            num_rows: rows.
            num_columns: columns.
            most_columns: no row will ever need more than these or ``num_columns``.
        """
        self._resize(*self.grown_room(num_rows, num_columns, most_columns))

    def grown_room(self, num_rows: int, num_columns: int, most_columns: int = 0) -> tuple[int, int]:
        """Return the slots and columns that `reserve` makes room for."""
        slots, room = self._room
        if num_rows > slots:  # the first rows take what they need: often there is one
            num_rows += num_rows // 4 if slots else 0
        if num_columns > room:
            more = num_columns + max(COLUMN_CHUNK, num_columns // 4)
            num_columns = max(num_columns, min(more, most_columns))
        return max(num_rows, slots), max(num_columns, room)

    def reserve_exactly(self, num_rows: int, num_columns: int) -> None:
        """Make room for so many rows of so many columns, and no more."""
        slots, room = self._room
        self._resize(max(num_rows, slots), max(num_columns, room))

    def shrink(self) -> None:
        """Give back memory that the rows do not use, but for some columns of room."""
        rows, columns = len(self.rows), self.columns + COLUMN_CHUNK
        smaller = min(self._room[0], rows), min(self._room[1], columns)
        self._room = smaller  # before: should memory end midway, some layers have just more than that
        none = torch.zeros(0, dtype=torch.long)
        for place, pair in enumerate(self.layers):
            keys, values = (states.picked(none, 0).grown(*smaller) for states in pair)
            for fresh, states in zip((keys, values), pair, strict=True):
                for new, old in zip(fresh.parts, states.parts, strict=True):
                    new.copy_(old[: smaller[0], :, : smaller[1]])
            self.layers[place] = keys, values

    def _resize(self, num_rows: int, num_columns: int) -> None:
        if (num_rows, num_columns) == self._room:
            return
        for place, (keys, values) in enumerate(self.layers):
            if keys.room != (num_rows, num_columns):  # of an attempt before, for which memory ended midway
                self.layers[place] = keys.grown(num_rows, num_columns), values.grown(num_rows, num_columns)
        self._room = num_rows, num_columns

    # ---- rows ----

    def write(self, slot: int, new: NewRow) -> None:
        """Copy a new row's prefix and own tokens into a slot behind the rows; it is not a row yet."""
        parts = [(new.layers, new.length)]
        if new.prefix is not None and new.prefix.num_columns:
            parts.insert(0, (new.prefix.layers, new.prefix.num_columns))
        start = 0
        for layers, length in parts:
            where = (slice(slot, slot + 1), slice(None), slice(start, start + length))
            for held, added in zip(self.layers, layers, strict=True):
                for states, tensor in zip(held, added, strict=True):
                    states.write(where, tensor[:, :, :length])
            start += length

    def take(self, row: Row, source: Bank) -> None:
        """Move a row here from another bank; there must be room. Takes no memory, so it cannot fail."""
        slot = source.rows.index(row)
        _copy(source.tensors, slot, self.tensors, len(self.rows), row.columns)
        self.rows.append(row)
        source.drop(row)

    def drop(self, row: Row) -> None:
        """Let a row go; the last one takes its slot. Takes no memory either."""
        slot, last = self.rows.index(row), self.rows[-1]
        if last is not row:
            _copy(self.tensors, len(self.rows) - 1, self.tensors, slot, last.columns)
            self.rows[slot] = last
        self.rows.pop()

    def own_tokens(self, row: Row) -> tuple[KeysValues, ...]:
        """Return a copy of a row's own keys and values per layer, each ``[1, K, S, H]``."""
        slot = self.rows.index(row)

        def read(states: PlainStates | Int8States) -> Tensor:
            return states.read(slot + 1, row.columns)[slot:, :, row.num_prefix :].clone()

        return tuple((read(keys), read(values)) for keys, values in self.layers)


def _copy(source: list[Tensor], slot: int, target: list[Tensor], target_slot: int, columns: int) -> None:
    for old, new in zip(source, target, strict=True):
        new[target_slot, :, :columns].copy_(old[slot, :, :columns])
