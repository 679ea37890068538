"""Continuous batching: greedy generation in a batch whose slots are refilled as requests finish.

Completions differ in length. A batch that ends when its longest row ends computes mostly rows that are done;
here a finished request leaves its slot to the next one. ``a7`` is the seventh token of request a::

    waiting  e f g h            of one prompt group after the other, longest first in each

    slot     0      1      2      3
    step     a7     b3     c9     d2
    step     a8     b4     END    d3      c is yielded; an eighth of the slots is empty (here one), so
    read                   e1             e is read, over the keys and values that c left behind
    step     a9     b5     e2     d4
     ...
    step     END    .      .      h85     . is an empty slot: computed along, its token ignored
    step     h86                          nothing waits any more: empty slots are dropped, h moves to 0

When memory runs out, requests go back to the queue with the tokens they have and are read again later.
Each request computes the same tokens wherever it sits (up to rounding), so none of this changes results.

Source:
    Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models" (OSDI),
    section 3 (iteration-level scheduling).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from glmtune.inference.engine.budget import Budget, no_memory
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.prompt_cache import PromptCache
from glmtune.inference.engine.prompt_groups import SharedPrompt
from glmtune.inference.engine.slots import Segment, SlotStates
from glmtune.inference.engine.stop_text import StopText
from glmtune.memory import is_out_of_memory, release_memory

REFILL_FRAC = 0.125
"""Share of the slots that must be empty before new requests are read.

The others stand still while prompts are read, and one prompt takes hardly less time than several. Waiting
wastes at most this share of each step, and a batch of 128 reads 16 prompts at once instead of one by one.
"""

SPARSE_FRAC = 0.75
"""Share of taken slots at or below which the empty ones are dropped, once no request waits for them.

Dropping copies the keys and values of those that stay. Each time at least a quarter of the batch goes, so a
batch of 128 is copied at most 17 times until it ends, and never a slot that a waiting request would fill.
"""

EndedRequest = tuple["Request", str]
"""A request and why it ended: ``eos``, ``stop`` or ``length``."""


@dataclass(eq=False)
class Request:
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
    """Generates for a queue of requests.

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
        """Start without requests; the budget shrinks when memory runs out; ``kv_cache`` see `SlotStates`."""
        self.stop_text = stop_text
        self._model, self._budget, self._cache = model, budget, PromptCache(model)
        self._stop_ids, self._max_new_tokens = stop_ids, max_new_tokens
        self._waiting: deque[Request] = deque()
        self._longest = 1  # own tokens that a request may come to have
        self._states = SlotStates(kv_cache)
        self._slots: list[Request | None] = []
        self._tokens: list[int] = []  # per slot: the next token to read
        self._positions = torch.zeros(0, 1, dtype=torch.long)  # per slot: of the last token read
        self._shared: dict[int, SharedPrompt] = {}  # by group, of the groups that have a slot

    def run(self, requests: Sequence[Request]) -> Iterator[EndedRequest]:
        """Generate until every request is done.

        Args:
            requests: in the order in which they are to be read; those of a group stand together.

        Yields:
            A request and why it ended.

        Raises:
            GlmtuneError: memory does not suffice for one request.
        """
        self._waiting.extend(requests)
        own = [len(request.prompt) - request.num_shared for request in requests]
        self._longest = max(own, default=0) + self._max_new_tokens
        while self._waiting or self._active:
            if self._is_time_to_read():
                yield from self._guarded(self._read)
            elif self._active:
                yield from self._guarded(self._step)

    @property
    def _active(self) -> list[int]:
        return [slot for slot, request in enumerate(self._slots) if request is not None]

    def _is_time_to_read(self) -> bool:
        capacity, num_active = self._budget.rows_to_hold(self._longest), len(self._active)
        free = capacity - num_active
        return bool(self._waiting) and (num_active == 0 or free >= max(1, REFILL_FRAC * capacity))

    # ---- what the model computes ----

    def _read(self) -> list[EndedRequest]:
        """Read the next requests of one group into empty slots and append their first tokens.

        Nothing of the batch changes before the model is done and the states have taken its keys and values,
        so that a lack of memory leaves everything as it was, and `_next_requests` says the same again.
        """
        requests = self._next_requests()
        group, num_shared = requests[0].group, requests[0].num_shared
        self._shared[group] = self._cache.get(requests[0].prompt[:num_shared])
        reading = self._model.read([each.own for each in requests], self._shared[group], keep=True)
        tokens = self._model.logits(reading.last_hidden_BD).argmax(-1).tolist()
        # Empty slots first, then new ones behind the last: the batch grows only where it is full.
        empty = [slot for slot, request in enumerate(self._slots) if request is None][: len(requests)]
        new = range(len(self._slots), len(self._slots) + len(requests) - len(empty))
        slots = [*empty, *new]
        self._states.put(slots, reading.layers, reading.lengths)
        self._positions = _with_rows_replaced(self._positions, slots, reading.positions)
        for slot, request in zip(slots, requests, strict=True):
            if slot == len(self._slots):
                self._slots.append(None)
                self._tokens.append(0)
            self._slots[slot] = request
            self._waiting.popleft()
        ended = self._append_tokens(slots, tokens)
        self._update_states()
        return ended

    def _next_requests(self) -> list[Request]:
        """Return what to read next: as many from the front of the queue as fit, of one group."""
        group = self._waiting[0].group
        free = self._budget.rows_to_hold(self._longest) - len(self._active)
        # Those of a group stand together, so these are the first of the queue.
        requests = [each for each in islice(self._waiting, max(1, free)) if each.group == group]
        lengths = [len(each.own) for each in requests]
        return requests[: self._budget.rows_to_read(lengths, requests[0].num_shared)]

    def _step(self) -> list[EndedRequest]:
        """Read one token per slot and append the ones that follow."""
        self._drop_empty_slots()
        positions = self._model.next_positions(self._positions)
        hidden_BD = self._model.step(self._tokens, positions, self._states)
        tokens = self._model.logits(hidden_BD).argmax(-1).tolist()
        self._positions = positions
        active = self._active
        ended = self._append_tokens(active, [tokens[slot] for slot in active])
        if ended:
            self._update_states()
        return ended

    def _append_tokens(self, slots: Sequence[int], tokens: Sequence[int]) -> list[EndedRequest]:
        """Append a new token to the request in each slot; requests that end leave theirs."""
        ended: list[EndedRequest] = []
        for slot, token in zip(slots, tokens, strict=True):
            request = self._slots[slot]
            assert request is not None
            self._tokens[slot] = token
            reason = self._end(request, token)
            if reason is not None:
                ended.append((request, reason))
                self._slots[slot] = None
        return ended

    def _end(self, request: Request, token: int) -> str | None:
        """Append a token; return why that ends the request, None if it goes on."""
        if token in self._stop_ids:
            return "eos"
        request.generated.append(token)
        if self.stop_text.is_complete(request.generated):
            return "stop"
        return "length" if len(request.generated) >= self._max_new_tokens else None

    # ---- which request has which slot ----

    def _update_states(self) -> None:
        """Tell the states which slots are empty now and which shared prompts the others begin with."""
        self._states.free([slot for slot, request in enumerate(self._slots) if request is None])
        members: dict[int, list[int]] = {}
        for slot, request in enumerate(self._slots):
            if request is not None:
                members.setdefault(request.group, []).append(slot)
        # Shared prompts that no slot needs any more are let go of here.
        self._shared = {group: self._shared[group] for group in members}
        # With one group the empty slots attend along, which costs less than picking the others out.
        self._states.segments = [
            Segment(
                shared, None if len(members) == 1 else torch.tensor(members[group]).to(self._model.device)
            )
            for group, shared in self._shared.items()
            if shared.token_ids
        ]

    def _drop_empty_slots(self) -> None:
        """Drop empty slots where nothing will fill them and they are many, or more than memory allows."""
        active, held = self._active, len(self._slots)
        is_too_large = held > self._budget.rows_to_hold(self._longest)
        if len(active) < held and (is_too_large or (not self._waiting and len(active) <= SPARSE_FRAC * held)):
            self._states.keep(active)  # first: where memory does not suffice for it, nothing has moved
            self._positions = self._positions[active]
            self._tokens = [self._tokens[slot] for slot in active]
            self._slots = [self._slots[slot] for slot in active]
            self._update_states()

    # ---- when memory runs out ----

    def _guarded(self, compute: Callable[[], list[EndedRequest]]) -> list[EndedRequest]:
        """Compute; where memory runs out, ask for less from now on and return nothing ended.

        The caller's loop then tries again: no request is lost, and none is generated twice.
        """
        try:
            with torch.no_grad():
                return compute()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Not in the except block: while the error lives, its traceback keeps the tensors of what failed.
        release_memory()
        self._retreat_from_reading() if compute == self._read else self._retreat_from_step()
        return []

    def _retreat_from_reading(self) -> None:
        """Read half as many prompts at once; if it was one, wait until requests in the batch have ended."""
        requests, num_active = self._next_requests(), len(self._active)
        if len(requests) > 1:
            self._budget.halve_reading(len(requests), max(len(each.own) for each in requests))
        elif num_active:
            self._budget.rows = num_active
        else:
            raise no_memory(len(requests[0].prompt))

    def _retreat_from_step(self) -> None:
        """Send the half of the requests that got least far back to the queue; what they have is kept.

        What goes back must be read again, prompt and generated tokens, so those with the fewest cost least;
        and those that got far are the ones that will soon end and make room.
        """
        active = self._active
        if len(active) == 1:
            request = self._slots[active[0]]
            raise no_memory(len(request.prompt) + len(request.generated) if request else 0)
        self._budget.halve(len(active))
        placed = [(slot, request) for slot, request in enumerate(self._slots) if request is not None]
        placed.sort(key=lambda item: -len(item[1].generated))
        # To the front of the queue by groups, longest first: the order in which requests came. Their groups
        # are those of the front or earlier ones, so the requests of a group still stand together.
        leaving = sorted(placed[self._budget.rows :], key=lambda item: (item[1].group, -len(item[1].own)))
        self._waiting.extendleft(request for _, request in reversed(leaving))
        for slot, _ in leaving:
            self._slots[slot] = None
        self._update_states()


def _with_rows_replaced(held: Tensor, slots: Sequence[int], new: Tensor) -> Tensor:
    """Return ``held`` ``[B, T]`` with some rows replaced, grown where slots lie beyond its end."""
    result = new.new_zeros(max(len(held), max(slots) + 1), new.shape[1])
    result[: len(held)] = held
    result[list(slots)] = new
    return result
