"""What a row brings into a generating batch, and what the batch remembers of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from glmtune.inference.engine.attention import KeysValues
from glmtune.inference.engine.prompt_groups import SharedPrompt


@dataclass(frozen=True, slots=True)
class PrefixStates:
    """A tuned prefix in front of a row's own tokens.

    Attributes:
        layers: keys and values per layer, each ``[1, K, P, H]``.
        strength: above 0; its log is added to the scores of the prefix' columns. 1 is the prefix as tuned.
        gates: of a prefix with a softmax of its own, ``[N]`` per layer, times its strength (1 above).
    """

    layers: Sequence[KeysValues]
    strength: float = 1.0
    gates: Sequence[Tensor] | None = None

    @property
    def num_columns(self) -> int:
        """Columns that it takes in front of each row, P; none if it is gated: it is attended to apart."""
        return 0 if self.gates is not None else self.layers[0][0].shape[2]


@dataclass(frozen=True, slots=True)
class NewRow:
    """A row that was read and is now to generate.

    Attributes:
        layers: keys and values of its own tokens per layer, each ``[1, K, S, H]``; columns from ``length`` on
            are ignored. Views are fine: everything is copied.
        length: own tokens.
        max_length: own tokens it may come to hold; no room beyond is made for it in advance.
        prefix: in front of its own tokens.
        shared: first tokens that several rows have in common; rows with the same object attend together.
    """

    layers: Sequence[KeysValues]
    length: int
    max_length: int
    prefix: PrefixStates | None = None
    shared: SharedPrompt | None = None


@dataclass(slots=True)
class Row:
    """A row in the batch. Its columns: a prefix without gates, its own tokens, those of the next pass.

    Attributes:
        row_id: its number, never given again.
        length: own tokens.
        max_columns: columns it may come to need.
        num_prefix: columns of the prefix.
        strength: of the prefix.
        shared: see `NewRow`; None where it has no tokens.
        gated: a prefix with a softmax of its own.
    """

    row_id: int
    length: int
    max_columns: int
    num_prefix: int
    strength: float
    shared: SharedPrompt | None
    gated: PrefixStates | None = None

    @property
    def columns(self) -> int:
        """Columns in use: where the next token goes."""
        return self.num_prefix + self.length

    @property
    def most_columns(self) -> int:
        """Columns that it may come to need, however many it was said to."""
        return max(self.max_columns, self.columns)
