"""A batch kept the plain way: per row one list of tokens, attention by concatenation, mask and softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glmtune.inference.engine.attention import KeysValues
from glmtune.inference.engine.prompt_groups import SharedPrompt
from glmtune.inference.engine.states.batch_states import BatchStates
from glmtune.inference.engine.states.rows import NewRow, PrefixStates
from glmtune.models.architectures.kv_cache import Int8States


@dataclass(frozen=True)
class Shape:
    """Sizes of the attention under test."""

    num_layers: int = 2
    num_heads: int = 4
    num_keys: int = 2
    width: int = 8


@dataclass
class PlainRow:
    """What a row holds, per layer keys and values ``[1, K, tokens, H]``."""

    shared: SharedPrompt | None
    prefix: PrefixStates | None
    own: list[KeysValues] = field(default_factory=list)


class Batches:
    """The states under test and the plain rows, driven alike with random tokens."""

    def __init__(self, shape: Shape, kv_cache: str, seed: int) -> None:
        self.shape, self.kv_cache = shape, kv_cache
        self.source = torch.Generator().manual_seed(seed)
        self.states = BatchStates(kv_cache)
        self.plain: dict[int, PlainRow] = {}
        self.scaling = shape.width**-0.5

    def layers(self, length: int) -> tuple[KeysValues, ...]:
        return tuple(
            (self.random(1, self.shape.num_keys, length), self.random(1, self.shape.num_keys, length))
            for _ in range(self.shape.num_layers)
        )

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, self.shape.width, generator=self.source)

    def stored(self, states: Tensor) -> Tensor:
        """What reading them back gives."""
        if self.kv_cache == "plain":
            return states
        held = Int8States.empty(states).grown(states.shape[0], states.shape[2])
        held.write((slice(None),), states)
        return held.read(states.shape[0], states.shape[2])

    def new_row(
        self,
        length: int,
        *,
        max_length: int = 0,
        prefix: PrefixStates | None = None,
        shared: SharedPrompt | None = None,
    ) -> NewRow:
        padding = int(torch.randint(0, 3, (), generator=self.source))
        layers = self.layers(length + padding)
        return NewRow(layers, length, max(length, max_length), prefix=prefix, shared=shared)

    def add(self, rows: list[NewRow]) -> list[int]:
        numbers = self.states.add(rows)
        for number, row in zip(numbers, rows, strict=True):
            own = [
                (self.stored(keys[:, :, : row.length]), self.stored(values[:, :, : row.length]))
                for keys, values in row.layers
            ]
            self.plain[number] = PlainRow(row.shared, row.prefix, own)
        return numbers

    def remove(self, numbers: list[int]) -> None:
        self.states.remove(numbers)
        for number in numbers:
            del self.plain[number]

    def step(
        self, num_tokens: int = 1, counts: list[int] | None = None, hook: list[KeysValues] | None = None
    ) -> None:
        """Step and compare every output with the reference; ``hook``: a prefix attached to the model."""
        order = self.states.order
        assert sorted(order) == sorted(self.plain)
        shape = self.shape
        mask = self.states.open_columns(num_tokens)
        assert mask.shape[0] == len(order)
        added: list[list[KeysValues]] = [[] for _ in order]
        for layer in range(shape.num_layers):
            query = self.random(len(order), shape.num_heads, num_tokens)
            new = tuple(self.random(len(order), shape.num_keys, num_tokens) for _ in range(2))
            before = None if hook is None else hook[layer]
            found = self.states.attend(layer, query, new, mask=mask, prefix=before, scaling=self.scaling)
            assert found.shape == (len(order), num_tokens, shape.num_heads, shape.width)
            for place, number in enumerate(order):
                keys, values = (self.stored(tensor[place : place + 1]) for tensor in new)
                added[place].append((keys, values))
                expected = self.expected(self.plain[number], layer, query[place], (keys, values), before)
                torch.testing.assert_close(found[place], expected, atol=2e-5, rtol=1e-4)
        self.states.advance(counts)
        for place, number in enumerate(order):
            count = num_tokens if counts is None else counts[place]
            plain = self.plain[number]
            plain.own = [
                (
                    torch.cat([keys, new_keys[:, :, :count]], 2),
                    torch.cat([values, new_values[:, :, :count]], 2),
                )
                for (keys, values), (new_keys, new_values) in zip(plain.own, added[place], strict=True)
            ]

    def expected(
        self, row: PlainRow, layer: int, query_NQH: Tensor, new: KeysValues, hook: KeysValues | None
    ) -> Tensor:
        """Attention of one row, ``[Q, N, H]``."""
        parts: list[KeysValues] = []
        strengths: list[float] = []
        if hook is not None:
            parts.append(hook)
            strengths.append(1)
        if row.shared is not None and row.shared.layers:
            parts.append(row.shared.layers[layer])
            strengths.append(1)
        if row.prefix is not None:
            keys, values = row.prefix.layers[layer]
            parts.append((self.stored(keys), self.stored(values)))
            strengths.append(row.prefix.strength)
        parts += [row.own[layer], new]
        strengths += [1, 1]
        keys, values = (torch.cat([part[index] for part in parts], 2)[0] for index in (0, 1))
        groups = self.shape.num_heads // self.shape.num_keys
        keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
        bias = torch.cat(
            [
                torch.full((part[0].shape[2],), math.log(strength))
                for part, strength in zip(parts, strengths, strict=True)
            ]
        )
        size, total = query_NQH.shape[1], keys.shape[1]
        hidden = torch.ones(size, total, dtype=torch.bool).triu(total - size + 1)
        scores = query_NQH @ keys.transpose(1, 2) * self.scaling + bias
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)

    def check_held(self) -> None:
        """Compare lengths and what the states hand back."""
        for number, row in self.plain.items():
            assert self.states.length(number) == row.own[0][0].shape[2]
            for found, expected in zip(self.states.keys_values(number), row.own, strict=True):
                for one, other in zip(found, expected, strict=True):
                    torch.testing.assert_close(one, other, atol=0, rtol=0)
