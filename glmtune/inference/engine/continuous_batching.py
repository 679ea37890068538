"""Greedy generation in a batch whose places are refilled as rows finish."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from glmtune.inference.engine.budget import Budget, no_memory
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.prompt_cache import PrefixStore
from glmtune.inference.engine.prompt_groups import SharedPrefix
from glmtune.inference.engine.slots import Segment, SlotStates
from glmtune.inference.engine.stop_text import StopText
from glmtune.memory import is_out_of_memory, release_memory

REFILL_FRAC = 0.125
"""Share of the slots that must be empty before new rows are read: reading a few at once is faster."""

SPARSE_FRAC = 0.75
"""Share of the slots below which a batch without successors is packed together."""

Finished = tuple["Row", str]


@dataclass(eq=False)
class Row:
    """A prompt and what was generated for it so far; after a lack of memory it is read again with both.

    Attributes:
        index: which prompt.
        prompt: its token ids.
        group: number of its group.
        num_shared: how many of its first tokens it shares with the others of the group.
        generated: tokens so far, without the one that ends the completion.
    """

    index: int
    prompt: tuple[int, ...]
    group: int = 0
    num_shared: int = 0
    generated: list[int] = field(default_factory=list)

    @property
    def own(self) -> list[int]:
        """The tokens to read behind the shared ones."""
        return [*self.prompt[self.num_shared :], *self.generated]


class ContinuousBatch:
    """Generates for a queue of rows.

    Attributes:
        stop_text: the stop strings and the decoder.
    """

    def __init__(
        self,
        model: EngineModel,
        budget: Budget,
        *,
        stop_ids: frozenset[int],
        stop_text: StopText,
        max_new_tokens: int,
        kv_cache: str = "plain",
    ) -> None:
        """Start without rows; the budget is mutated when memory runs out; ``kv_cache`` see `SlotStates`."""
        self.stop_text = stop_text
        self._model, self._budget, self._store = model, budget, PrefixStore(model)
        self._stop_ids, self._max_new_tokens = stop_ids, max_new_tokens
        self._waiting: deque[Row] = deque()
        self._longest = 1
        self._states = SlotStates(kv_cache)
        self._slots: list[Row | None] = []
        self._tokens: list[int] = []  # per slot: the next token to read
        self._positions = torch.zeros(0, 1, dtype=torch.long)  # per slot: of the last token read
        self._shared: dict[int, SharedPrefix] = {}  # group -> its beginning

    def run(self, rows: Sequence[Row]) -> Iterator[Finished]:
        """Generate until every row is done.

        Args:
            rows: in the order in which they are to be read; those of a group stand together.

        Yields:
            A row and why it ended: ``eos``, ``stop`` or ``length``.

        Raises:
            GlmtuneError: memory does not suffice for one row.
        """
        self._waiting.extend(rows)
        own = [len(row.prompt) - row.num_shared for row in rows]
        self._longest = max(own, default=0) + self._max_new_tokens
        while self._waiting or self._active:
            if self._is_time_to_read():
                yield from self._guarded(self._read)
            elif self._active:
                yield from self._guarded(self._step)

    @property
    def _active(self) -> list[int]:
        return [slot for slot, row in enumerate(self._slots) if row is not None]

    def _is_time_to_read(self) -> bool:
        capacity, num_active = self._budget.rows_to_hold(self._longest), len(self._active)
        free = capacity - num_active
        return bool(self._waiting) and (num_active == 0 or free >= max(1, REFILL_FRAC * capacity))

    # ---- what the model computes ----

    def _read(self) -> list[Finished]:
        """Read the next rows of one group into empty slots and take their first tokens."""
        rows = self._next_rows()
        group, num_shared = rows[0].group, rows[0].num_shared
        self._shared[group] = self._store.get(rows[0].prompt[:num_shared])
        reading = self._model.read([row.own for row in rows], self._shared[group], keep=True)
        tokens = self._model.logits(reading.last_hidden_BD).argmax(-1).tolist()
        empty = [slot for slot, row in enumerate(self._slots) if row is None][: len(rows)]
        new = range(len(self._slots), len(self._slots) + len(rows) - len(empty))
        slots = [*empty, *new]
        self._states.put(slots, reading.layers, reading.lengths)
        self._positions = _put_rows(self._positions, slots, reading.positions)
        for slot, row in zip(slots, rows, strict=True):
            if slot == len(self._slots):
                self._slots.append(None)
                self._tokens.append(0)
            self._slots[slot] = row
            self._waiting.popleft()
        finished = self._take(slots, tokens)
        self._settle()
        return finished

    def _next_rows(self) -> list[Row]:
        group = self._waiting[0].group
        free = self._budget.rows_to_hold(self._longest) - len(self._active)
        rows = [row for row in islice(self._waiting, max(1, free)) if row.group == group]
        lengths = [len(row.own) for row in rows]
        return rows[: self._budget.rows_to_read(lengths, rows[0].num_shared)]

    def _step(self) -> list[Finished]:
        """Read one token per slot and take the next ones."""
        self._pack()
        positions = self._model.next_positions(self._positions)
        hidden_BD = self._model.step(self._tokens, positions, self._states)
        tokens = self._model.logits(hidden_BD).argmax(-1).tolist()
        self._positions = positions
        active = self._active
        finished = self._take(active, [tokens[slot] for slot in active])
        if finished:
            self._settle()
        return finished

    def _take(self, slots: Sequence[int], tokens: Sequence[int]) -> list[Finished]:
        """Append the new tokens to their rows; rows that are done leave their slots."""
        finished: list[Finished] = []
        for slot, token in zip(slots, tokens, strict=True):
            row = self._slots[slot]
            assert row is not None
            self._tokens[slot] = token
            reason = self._end(row, token)
            if reason is not None:
                finished.append((row, reason))
                self._slots[slot] = None
        return finished

    def _end(self, row: Row, token: int) -> str | None:
        if token in self._stop_ids:
            return "eos"
        row.generated.append(token)
        if self.stop_text.is_complete(row.generated):
            return "stop"
        return "length" if len(row.generated) >= self._max_new_tokens else None

    # ---- who sits where ----

    def _settle(self) -> None:
        """Tell the states which slots are empty and which beginnings the others have."""
        self._states.free([slot for slot, row in enumerate(self._slots) if row is None])
        members: dict[int, list[int]] = {}
        for slot, row in enumerate(self._slots):
            if row is not None:
                members.setdefault(row.group, []).append(slot)
        self._shared = {group: self._shared[group] for group in members}
        self._states.segments = [
            Segment(
                shared, None if len(members) == 1 else torch.tensor(members[group]).to(self._model.device)
            )
            for group, shared in self._shared.items()
            if shared.token_ids
        ]

    def _pack(self) -> None:
        """Drop empty slots where nothing will fill them and they are many."""
        active, held = self._active, len(self._slots)
        is_too_large = held > self._budget.rows_to_hold(self._longest)
        if len(active) < held and (is_too_large or (not self._waiting and len(active) <= SPARSE_FRAC * held)):
            self._states.keep(active)
            self._positions = self._positions[active]
            self._tokens = [self._tokens[slot] for slot in active]
            self._slots = [self._slots[slot] for slot in active]
            self._settle()

    # ---- when memory runs out ----

    def _guarded(self, compute: Callable[[], list[Finished]]) -> list[Finished]:
        """Compute; where memory runs out, free half of what asked for it and return nothing finished."""
        try:
            with torch.no_grad():
                return compute()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        release_memory()
        self._retreat_from_reading() if compute == self._read else self._retreat_from_step()
        return []

    def _retreat_from_reading(self) -> None:
        rows, num_active = self._next_rows(), len(self._active)
        if len(rows) > 1:
            self._budget.halve_reading(len(rows), max(len(row.own) for row in rows))
        elif num_active:
            self._budget.rows = num_active
        else:
            raise no_memory(len(rows[0].prompt))

    def _retreat_from_step(self) -> None:
        """Send the rows that got least far back to the queue; what they have so far is kept."""
        active = self._active
        if len(active) == 1:
            row = self._slots[active[0]]
            raise no_memory(len(row.prompt) + len(row.generated) if row else 0)
        self._budget.halve(len(active))
        placed = [(slot, row) for slot, row in enumerate(self._slots) if row is not None]
        placed.sort(key=lambda item: -len(item[1].generated))
        leaving = sorted(placed[self._budget.rows :], key=lambda item: (item[1].group, -len(item[1].own)))
        self._waiting.extendleft(row for _, row in reversed(leaving))
        for slot, _ in leaving:
            self._slots[slot] = None
        self._settle()


def _put_rows(held: Tensor, slots: Sequence[int], new: Tensor) -> Tensor:
    """Return ``held`` with rows replaced, grown where slots lie beyond its end."""
    result = new.new_zeros(max(len(held), max(slots) + 1), new.shape[1])
    result[: len(held)] = held
    result[list(slots)] = new
    return result
