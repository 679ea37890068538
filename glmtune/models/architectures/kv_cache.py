"""Keys and values in memory with room for tokens to come, in the model's type or as INT8 codes.

INT8 codes take half the memory of a long context, at a small error. Every token has a scale of its own in
every head, so nothing already stored changes when a token is added, and the result does not depend on the
pieces in which a prompt is read. One scale per channel, or for a group of tokens, would be more exact, but
had to be found anew when a token is larger than those before.

Shapes: B rows, K key/value heads, C columns (tokens), D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

COLUMN_CHUNK = 64
"""Columns by which a cache grows at least; beyond 256 columns it is a quarter of what is there. Growing
copies everything, so by a share of the size a token costs a constant number of copies, whatever the
length."""


class PlainStates:
    """Keys or values in their own floating type.

    Attributes:
        values_BKCD: with room for tokens to come.
    """

    def __init__(self, values_BKCD: Tensor) -> None:
        """Take the memory."""
        self.values_BKCD = values_BKCD

    @classmethod
    def empty(cls, like: Tensor) -> PlainStates:
        """Return states without rows, of the heads and width of ``like`` ``[B, K, C, D]``."""
        return cls(like[:0, :, :0])

    @property
    def room(self) -> tuple[int, int]:
        """Rows and columns there is memory for."""
        return self.values_BKCD.shape[0], self.values_BKCD.shape[2]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All that is held, each ``[B, K, C, ...]``: for moving rows as they are."""
        return (self.values_BKCD,)

    def write(self, where: Any, new: Tensor) -> None:
        """Put states ``[..., D]`` at an index over rows, heads and columns."""
        self.values_BKCD[where] = new

    def read(self, rows: int, columns: int) -> Tensor:
        """Return the first rows and columns in floating point, ``[B, K, C, D]``."""
        return self.values_BKCD[:rows, :, :columns]

    def picked(self, rows: Tensor, columns: int) -> PlainStates:
        """Return some of the rows, cut after some columns, in memory of their own."""
        return PlainStates(self.values_BKCD[rows, :, :columns])

    def grown(self, rows: int, columns: int) -> PlainStates:
        """Return the same with room for more, zeroed."""
        return PlainStates(_larger(self.values_BKCD, rows, columns))


class Int8States:
    """Keys or values as codes; the interface of `PlainStates`.

    Attributes:
        codes_BKCD: int8, −127 to 127.
        scale_BKC1: float32, units per code.
        dtype: of what `read` returns.
    """

    def __init__(self, codes_BKCD: Tensor, scale_BKC1: Tensor, dtype: torch.dtype) -> None:
        """Take the memory."""
        self.codes_BKCD, self.scale_BKC1, self.dtype = codes_BKCD, scale_BKC1, dtype

    @classmethod
    def empty(cls, like: Tensor) -> Int8States:
        """See `PlainStates`."""
        none = like[:0, :, :0]
        return cls(none.to(torch.int8), none[..., :1].float(), like.dtype)

    @property
    def room(self) -> tuple[int, int]:
        """See `PlainStates`."""
        return self.codes_BKCD.shape[0], self.codes_BKCD.shape[2]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """See `PlainStates`."""
        return self.codes_BKCD, self.scale_BKC1

    @property
    def num_bytes(self) -> int:
        """Memory taken, room for tokens to come included."""
        return self.codes_BKCD.nbytes + self.scale_BKC1.nbytes

    def write(self, where: Any, new: Tensor) -> None:
        """See `PlainStates`."""
        scale = new.abs().amax(-1, keepdim=True).float() / 127
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # zeros stay zeros, without 0 / 0
        self.codes_BKCD[where] = (new / scale).round_().to(torch.int8)
        self.scale_BKC1[where] = scale

    def read(self, rows: int, columns: int) -> Tensor:
        """See `PlainStates`."""
        scale = self.scale_BKC1[:rows, :, :columns]
        return (self.codes_BKCD[:rows, :, :columns] * scale).to(self.dtype)

    def picked(self, rows: Tensor, columns: int) -> Int8States:
        """See `PlainStates`."""
        codes, scale = self.codes_BKCD[rows, :, :columns], self.scale_BKC1[rows, :, :columns]
        return Int8States(codes, scale, self.dtype)

    def grown(self, rows: int, columns: int) -> Int8States:
        """See `PlainStates`."""
        codes, scale = _larger(self.codes_BKCD, rows, columns), _larger(self.scale_BKC1, rows, columns)
        return Int8States(codes, scale, self.dtype)


STATES: dict[str, type[PlainStates] | type[Int8States]] = {"plain": PlainStates, "int8": Int8States}
"""Name in `glmtune.models.settings.KV_CACHES` → how keys and values are held."""


class GrowingLayer(DynamicLayer):
    """One layer of transformers' cache that grows by chunks: a new token is written behind the others.

    transformers' own layer copies all keys and values for every token. What `update` hands out are views,
    which stay as they are until rows are reordered or tokens forgotten.
    """

    is_croppable = True
    states_type: type[PlainStates] | type[Int8States] = PlainStates
    """How keys and values are held."""

    def __init__(self, *_: object, **__: object) -> None:
        """Start empty; what the parents' constructors would set is read from the states."""
        self.is_initialized = False
        self._states: tuple[PlainStates | Int8States, PlainStates | Int8States] | None = None
        self._length = 0
        self._owns_room = True  # a copy of a layer shares its memory and must not write into it
        self._has_copies = False

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All keys in floating point, ``[B, K, C, D]``; None: no token yet."""
        return None if self._states is None else self._read()[0]

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All values, likewise."""
        return None if self._states is None else self._read()[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take type, device, heads and width from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._states = (self.states_type.empty(key_states), self.states_type.empty(value_states))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens.

        Args:
            key_states: ``[B, K, new, D]``.
            value_states: the same shape.
            *args: of other caches.
            **kwargs: of other caches.

        Returns:
            All keys and values in floating point, the new ones as they are stored.
        """
        if not self.is_initialized or self._states is None:
            self.lazy_initialization(key_states, value_states)
        assert self._states is not None
        rows, start, stop = len(key_states), self._length, self._length + key_states.shape[2]
        is_recorded = torch.is_grad_enabled() and key_states.requires_grad  # a gradient needs what was read
        # Written in place, unless somebody still needs the memory as it is: a copy of this layer, or the
        # backward pass, for which autograd kept views of it.
        if not self._owns_room or is_recorded or stop > self._states[0].room[1]:
            room = stop + max(COLUMN_CHUNK, stop // 4)
            keys, values = self._states
            self._put((keys.grown(rows, room), values.grown(rows, room)))
        for states, new in zip(self._states, (key_states, value_states), strict=True):
            states.write((slice(None), slice(None), slice(start, stop)), new)
        self._length = stop
        return self._read()

    def _read(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values, ``[B, K, C, D]``."""
        assert self._states is not None
        rows = self._states[0].room[0]
        return self._states[0].read(rows, self._length), self._states[1].read(rows, self._length)

    def _put(self, states: tuple[PlainStates | Int8States, PlainStates | Int8States]) -> None:
        """Take keys and values that nobody else has."""
        self._states, self._owns_room, self._has_copies = states, True, False

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; transformers gives their number with a minus."""
        self._length -= abs(tokens_to_remove)
        self._owns_room &= not self._has_copies  # what is forgotten here may be remembered by a copy

    def reset(self) -> None:
        """Start empty again."""
        self._states, self._length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of the beams that survived."""
        self._pick(lambda rows: beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._pick(lambda rows: indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._pick(lambda rows: torch.arange(rows).repeat_interleave(repeats))

    def _pick(self, choose: Callable[[int], Tensor]) -> None:
        if self._states is not None:
            rows, columns = self._states[0].room
            chosen = choose(rows).to(self.device)
            keys, values = self._states
            self._put((keys.picked(chosen, columns), values.picked(chosen, columns)))

    # A conversation that is continued twice shares its memory until one side writes: the copy gives up the
    # right to write at once, the original when it forgets tokens that the copy still has.
    def __copy__(self) -> GrowingLayer:
        self._has_copies = True
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self) | {"_owns_room": False})
        return twin


class Int8Layer(GrowingLayer):
    """A growing layer whose keys and values are codes."""

    states_type = Int8States

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        held = self._states or ()
        return sum(states.num_bytes for states in held if isinstance(states, Int8States))


LAYERS: dict[str, type[GrowingLayer]] = {"plain": GrowingLayer, "int8": Int8Layer}
"""Name in `glmtune.models.settings.KV_CACHES` → a layer of a cache for ``generate``."""


def let_grow(cache: Cache | None) -> None:
    """Let a cache of transformers that is still empty grow in place instead of by copies.

    Args:
        cache: mutated, if all of its layers are transformers' plain ones and stay on their device.
    """
    if cache is not None and not cache.offloading and cache.get_seq_length() == 0:
        layers: list[Any] = cache.layers
        if all(type(layer) is DynamicLayer for layer in layers):
            layers[:] = [GrowingLayer() for _ in layers]


class Int8Cache(Cache):
    """A cache for transformers' ``generate`` whose keys and values are codes.

    Handed over as ``model.generate(..., past_key_values=Int8Cache())``.
    """

    def __init__(self) -> None:
        """Start empty; layers appear as they are written."""
        super().__init__(layer_class_to_replicate=Int8Layer)

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values."""
        return sum(layer.num_bytes for layer in self.layers if isinstance(layer, Int8Layer))


def _larger(states: Tensor, rows: int, columns: int) -> Tensor:
    """Return zeroed states ``[B, K, C, D]`` of at least these sizes that begin with what was held."""
    rows, columns = max(rows, states.shape[0]), max(columns, states.shape[2])
    larger = states.new_zeros(rows, states.shape[1], columns, states.shape[3])
    larger[: states.shape[0], :, : states.shape[2]] = states
    return larger
