"""Gated prefixes of rows: held once however many rows have them, attended to apart, and added.

A row's columns in its bank are its tokens alone then, and rows with gated prefixes, with others and with none
share banks and passes.

Shapes: B rows, N query heads, Q new tokens, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmtune.inference.engine.states.rows import PrefixStates
from glmtune.prefix.gate import add_gated


@dataclass(frozen=True, slots=True)
class GatedRows:
    """The rows with one gated prefix of one strength.

    Attributes:
        prefix: its keys, values and gates lie on the device of each layer.
        places: of the rows, int64; None: all rows.
    """

    prefix: PrefixStates
    places: Tensor | None

    def to(self, device: torch.device) -> GatedRows:
        """Return the same for layers on a device."""
        return GatedRows(self.prefix, None if self.places is None else self.places.to(device))

    def add(self, mixed_BQNH: Tensor, query: Tensor, layer: int, scaling: float) -> Tensor:
        """Add the prefix to what its rows saw in their tokens.

        Args:
            mixed_BQNH: attention of all rows, ``[B, Q, N, H]``; may be overwritten.
            query: of all rows, ``[B, N, Q, H]``.
            layer: index of the layer.
            scaling: factor of the scores.
        """
        assert self.prefix.gates is not None
        states, gate = self.prefix.layers[layer], self.prefix.gates[layer]
        if self.places is None:
            return add_gated(mixed_BQNH, query, states, gate, scaling=scaling)
        mine = mixed_BQNH[self.places], query[self.places]
        mixed_BQNH[self.places] = add_gated(*mine, states, gate, scaling=scaling)
        return mixed_BQNH


def gated_rows(prefixes: Sequence[PrefixStates | None], device: torch.device) -> list[GatedRows]:
    """Put rows with the same gated prefix together.

    Args:
        prefixes: of each row, or of all rows where there is but one; those without gates count as none.
        device: where the rows are.
    """
    members: dict[int, list[int]] = {}
    found: dict[int, PrefixStates] = {}
    for place, prefix in enumerate(prefixes):
        if prefix is not None and prefix.gates is not None:
            found[id(prefix)] = prefix  # told by identity: one object per prefix and strength
            members.setdefault(id(prefix), []).append(place)
    return [
        GatedRows(found[key], None if len(places) == len(prefixes) else torch.tensor(places, device=device))
        for key, places in members.items()
    ]
