"""The rows that run in one pass, and one step with all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from glmtune.inference.engine.attention import KeysValues
from glmtune.inference.engine.batching.row import Row
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.states.batch_states import BatchStates
from glmtune.inference.engine.states.rows import NewRow


class RunningRows:
    """Rows whose prompts are read, with their keys and values; all of one LoRA, or of none.

    Attributes:
        states: the keys and values.
    """

    def __init__(self, kv_cache: str) -> None:
        """Start empty; ``kv_cache`` see `BatchStates`."""
        self.states = BatchStates(kv_cache)
        self._rows: dict[int, Row] = {}
        self._ids: dict[Row, int] = {}

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._rows)

    def __contains__(self, row: object) -> bool:
        """Whether a row is among them."""
        return row in self._ids

    @property
    def rows(self) -> list[Row]:
        """The rows, in the order in which they came."""
        return list(self._ids)

    def add(self, rows: Sequence[Row], new: Sequence[NewRow]) -> None:
        """Put rows in with what was read of them; where memory ends, nothing is changed."""
        for row, row_id in zip(rows, self.states.add(new), strict=True):
            self._rows[row_id], self._ids[row] = row, row_id

    def remove(self, row: Row, *, is_damaged: bool = False) -> None:
        """Take a row out; what is damaged is not left lying about for the next one in its place."""
        row_id = self._ids.pop(row)
        del self._rows[row_id]
        if is_damaged:
            self.states.blank(row_id)
        self.states.remove([row_id])

    @property
    def cost(self) -> int:
        """Columns that the rows may come to hold."""
        return sum(row.cost for row in self._ids)

    def keys_values(self, row: Row) -> tuple[KeysValues, ...]:
        """Return the keys and values of a row's own tokens, copied."""
        return self.states.keys_values(self._ids[row])

    def length(self, row: Row) -> int:
        """Own tokens of a row whose keys and values are held."""
        return self.states.length(self._ids[row])

    def step(self, model: EngineModel, drafts: Mapping[Row, Sequence[int]]) -> tuple[list[Row], Tensor]:
        """Read the last token of every row, and what may follow it.

        Args:
            model: what reads them.
            drafts: tokens to read behind the last ones of some rows.

        Returns:
            The rows in the order of the batch, and the hidden states ``[rows, Q, D]`` of their tokens. Rows
            with shorter drafts are filled up with tokens that count for nothing.
        """
        rows = [self._rows[row_id] for row_id in self.states.order]
        width = 1 + max(map(len, drafts.values()), default=0)
        tokens: list[list[int]] = []
        for row in rows:
            own = [row.last_token, *drafts.get(row, ())]
            tokens.append([*own, *[0] * (width - len(own))])
        position_BTQ = torch.tensor([row.positions(width) for row in rows], device=model.device)
        return rows, model.step(tokens, position_BTQ, self.states)

    def take_back(self, row: Row, count: int) -> None:
        """Let a row's last tokens be none: their keys and values will be written over."""
        self.states.take_back(self._ids[row], count)

    def advance(self, counts: Sequence[int] | None = None) -> None:
        """Count the tokens just read.

        Args:
            counts: how many of its tokens each row keeps, in the order of `step`; None: all.
        """
        self.states.advance(counts)
