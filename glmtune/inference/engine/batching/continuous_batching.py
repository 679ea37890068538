"""Continuous batching: rows join as soon as there is room and leave as soon as they end.

Answers differ in length. A batch that ends when its longest row ends computes mostly rows that are done; here
a row that ended leaves its place to the next one. ``a7`` is the seventh token of row a::

    waiting  e f g h            strictly in order

    place    0      1      2      3
    step     a7     b3     c9     d2
    step     a8     b4     END    d3      c is over, and e is admitted: what it may come to hold fits
    piece                  (e)            the first piece of e's prompt; e is not running yet
    step     a9     b5     .      d4      at most one piece between two steps, so a, b and d never stall
    piece                  e1             the rest of the prompt, and with it the first token
    step     a10    b6     e2     d5
     ...

A row is admitted by all that it may come to hold, so that a row that runs is never sent away for another.
Only when memory runs out all the same, rows go back to the queue with the tokens they have and are read again
later. Each row computes the same tokens wherever it sits (up to rounding), so none of this changes results.

Source:
    Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models" (OSDI),
    section 3 (iteration-level scheduling); Agrawal et al. 2023, arXiv:2308.16369 (prompts in pieces).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from glmtune.errors import GlmtuneError
from glmtune.inference.engine.adapters import BASE, HeldLora, active_layers
from glmtune.inference.engine.attention import KeysValues
from glmtune.inference.engine.batching.drafting import Drafter
from glmtune.inference.engine.batching.kept_caches import (
    MIN_REUSED_TOKENS,
    KeptCaches,
    copied,
    copy_if_room,
    find_leader,
)
from glmtune.inference.engine.batching.next_tokens import NextToken, choose_tokens, step_rows
from glmtune.inference.engine.batching.prompt_reader import Piece, PromptReader, ReadPiece
from glmtune.inference.engine.batching.row import Row
from glmtune.inference.engine.batching.running_rows import RunningRows
from glmtune.inference.engine.budget import Budget, no_memory
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.sampling.choose import TokenChooser
from glmtune.inference.requests.request import FinishReason
from glmtune.inference.requests.request import Piece as AnswerPiece
from glmtune.memory import is_out_of_memory, release_memory

LOGGER = logging.getLogger(__name__)

REFILL_FRAC = 0.125
"""Where nobody waits for single tokens: share of the places that must be empty before more prompts are read.

The others stand still while prompts are read, and one prompt takes hardly less time than several. Waiting
wastes at most this share of each step, and a batch of 128 reads 16 prompts at once instead of one by one.
"""


class ContinuousBatch:
    """Generates for a queue of rows.

    Attributes:
        num_prompt_tokens: tokens of the prompts of rows that were admitted.
        num_cached_tokens: how many of these need not be read.
        num_new_tokens: tokens generated.
        drafter: drafts tokens for the rows, and counts how many were right.
        switched: by adapter, how often its switch decided for it, and against; other threads read it.
    """

    def __init__(
        self,
        model: EngineModel,
        budget: Budget,
        *,
        kv_cache: str = "plain",
        piece_tokens: int | None = None,
        reuses_caches: bool = False,
        raises_errors: bool = False,
        prompt_lookup_tokens: int = 0,
        shares_answers: bool = False,
    ) -> None:
        """Start without rows.

        Args:
            model: what computes.
            budget: how much at once; it shrinks when memory runs out.
            kv_cache: see `BatchStates`.
            piece_tokens: most prompt tokens that are read between two steps; None: all prompts that may be
                are read, to their end, before the next step.
            reuses_caches: keep the caches of finished rows for later ones.
            raises_errors: what goes wrong with a row is raised, instead of ending that row alone.
            prompt_lookup_tokens: see `EngineSettings`.
            shares_answers: see `Drafter`.
        """
        self.num_prompt_tokens = self.num_cached_tokens = self.num_new_tokens = 0
        self.switched: Mapping[str, tuple[int, int]] = {}
        self._model, self._budget, self._kv_cache = model, budget, kv_cache
        self._chooser = TokenChooser()
        self.drafter = Drafter(prompt_lookup_tokens, model, shares_answers=shares_answers)
        self._piece_tokens, self._raises_errors = piece_tokens, raises_errors
        # Codes of keys and values are not what was read: a later row would not compute the same.
        self._kept = KeptCaches() if reuses_caches and model.can_share and kv_cache == "plain" else None
        self._waiting: deque[Row] = deque()
        self._reader = PromptReader(model, budget, piece_tokens)
        self._running: dict[HeldLora | None, RunningRows] = {}
        self._committed = 0  # columns that the rows read or running may come to hold
        self._largest = 1  # of these, the most of one row
        self._ended: list[Row] = []

    # ---- rows come and go

    def add(self, rows: Sequence[Row]) -> None:
        """Put rows at the end of the queue; those of a group stand together."""
        self._waiting.extend(rows)
        self._largest = max([self._largest, *(row.cost for row in rows)])

    def end(self, row: Row, reason: FinishReason, error: str = "") -> None:
        """End a row from outside (it was cancelled, the engine stops); one that has ended stays as it is."""
        if row.finish_reason is None:
            self._leave(row)
            self._give(row, AnswerPiece(finish_reason=reason, error=error))

    @property
    def rows(self) -> list[Row]:
        """All rows that have not ended."""
        return [*self._running_rows, *self._reader.rows, *self._waiting]

    @property
    def num_waiting(self) -> int:
        """Rows in the queue."""
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """Rows that are being read or run."""
        return len(self._reader.rows) + self._num_running

    @property
    def held_tokens(self) -> int:
        """Columns of keys and values of rows that are being read or run."""
        running = sum(row.num_held for row in self._running_rows)
        return running + sum(row.num_read for row in list(self._reader.rows))

    @property
    def allocated_tokens(self) -> int:
        """Columns that there is memory for, of running rows with their room for tokens to come."""
        running = sum(each.states.held_tokens for each in list(self._running.values()))
        return running + sum(row.num_read for row in list(self._reader.rows)) + self.kept_tokens

    @property
    def kept_tokens(self) -> int:
        """Tokens of finished rows that are held."""
        return self._kept.num_tokens if self._kept else 0

    @property
    def _running_rows(self) -> list[Row]:
        # Of copies: other threads ask for numbers while rows come and go.
        return [row for running in list(self._running.values()) for row in running.rows]

    @property
    def _num_running(self) -> int:
        return sum(map(len, list(self._running.values())))

    # ---- one step

    def step(self) -> list[Row]:
        """Read what is to be read now and one token of every row that runs.

        Returns:
            The rows that ended.

        Raises:
            GlmtuneError: with ``raises_errors``: memory does not suffice for one row, or an output is not
                finite.
        """
        self._admit()
        self._share_memory()
        while self._reader.rows:
            self._follow()
            piece = self._reader.next_piece(others_run=bool(self._num_running))
            self._attempt(partial(self._read, piece), [row for row, _ in piece], self._retreat_from_reading)
            if self._piece_tokens is not None:
                break
            self._admit()
        for lora, running in list(self._running.items()):
            if len(running):
                self._attempt(partial(self._step, running, lora), running.rows, self._retreat_from_step)
            if not len(running):  # with all its memory: the next row begins anew
                self._running.pop(lora, None)
        if self._kept is not None:
            self._kept.shrink(self._room_to_keep())
        ended, self._ended = self._ended, []
        return ended

    def _admit(self) -> None:
        """Let rows in from the front of the queue while all that they may come to hold fits."""
        if self._piece_tokens is not None and not self.num_active:
            self._budget.recover()  # who waits for single tokens does not pay for a bad moment for ever
        if self._piece_tokens is None and self.num_active:
            capacity = self._budget.rows_to_hold(self._largest)
            if capacity - self.num_active < max(1, REFILL_FRAC * capacity):
                return
        while self._waiting and self._has_room(self._waiting[0]):
            row = self._waiting.popleft()
            self._committed += row.cost
            self._reader.rows.append(row)
            if self._kept is not None:
                self._kept.shrink(self._budget.held_tokens - self._committed)
                self._find_cache(row)
            if not row.generated:  # else it was sent back, and is counted
                self.num_prompt_tokens += len(row.prompt)
                self._chooser.add(row.number, row.request.sampling, row.prompt)

    def _find_cache(self, row: Row) -> None:
        """Let a row that has read nothing go on from what earlier ones have read of its prompt."""
        if self._kept is None or row.request.sampling.prompt_logprobs is not None:
            return  # prompt_logprobs need the hidden state of every token
        row.num_read, row.layers = self._kept.find(row.adapter.cache_key, row.own)
        find_leader(
            row, [each for each in (*self._running_rows, *self._reader.rows) if each.number < row.number]
        )
        if not row.generated:  # else it was sent back, and is counted
            self.num_cached_tokens += row.num_read - row.num_cached
            row.num_cached = row.num_read
            if row.generation is not None:
                row.generation.num_cached_tokens = row.num_cached

    def _has_room(self, row: Row) -> bool:
        if not self.num_active:  # one alone is tried whatever it may come to hold
            return True
        has_columns = self._committed + row.cost <= self._budget.held_tokens
        return has_columns and self.num_active < self._budget.rows

    def _share_memory(self, joining: Sequence[Row] = ()) -> None:
        """Tell the running rows' states how much memory they may take, and hold those to it that have more.

        That is what their rows may come to hold, and an equal share of what no row is admitted for: room in
        front of the rows, and beside them in their banks. Caches kept for later make way for it.

        Args:
            joining: rows about to join those of their LoRA.
        """
        spare = max(0, self._budget.held_tokens - self._committed) // max(1, len(self._running))
        for lora, running in self._running.items():
            states = running.states
            states.limit = running.cost + spare
            if joining and joining[0].adapter.lora is lora:
                states.limit += sum(row.cost for row in joining)
            if states.held_tokens > states.limit:
                states.tighten(keep_room=False)

    def _room_to_keep(self, leaving: Row | None = None) -> int:
        """Return the columns that caches may take, once a row has left; what is admitted goes first."""
        taken = sum(row.cost for row in self._reader.rows)
        for running in self._running.values():
            rows = [row for row in running.rows if row is not leaving]
            if rows:  # else all its memory goes
                taken += max(sum(row.cost for row in rows), running.states.held_tokens)
        return self._budget.held_tokens - taken

    def _follow(self) -> None:
        """Let rows that wait for what another one reads go on from there, where that is read."""
        copies: dict[Row, tuple[KeysValues, ...]] = {}
        for row in self._reader.rows:
            leader, length = row.leader, row.num_common
            if leader is None or (leader in self._reader.rows and leader.num_read < length):
                continue
            row.leader = None
            layers = leader.layers
            for running in self._running.values():
                if leader in running and leader not in copies:
                    copies[leader] = copy_if_room(partial(running.keys_values, leader))
            if not (layers := copies.get(leader, layers)):  # it is gone
                continue
            row.layers = tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in layers)
            if not row.generated:
                self.num_cached_tokens += length - row.num_read
                row.num_cached = length
                if row.generation is not None:
                    row.generation.num_cached_tokens = length
            row.num_read = length

    # ---- what the model computes

    def _read(self, piece: Piece) -> None:
        """Read a piece of some prompts; those that are read to their end run from now on.

        Nothing of the batch changes before the model is done and the states have taken its keys and values,
        so that a lack of memory leaves everything as it was.
        """
        read = self._reader.read(piece)
        chosen: list[tuple[Row, NextToken]] = []
        if read.logits is not None:
            running = self._running.setdefault(piece[0][0].adapter.lora, RunningRows(self._kv_cache))
            self._share_memory(read.ready)
            running.add(read.ready, read.new_rows)
            try:
                chosen = choose_tokens(self._model, self._chooser, read.ready, read.logits)
            except BaseException:
                for row in read.ready:
                    running.remove(row)
                raise
        self._reader.settle(read)
        self._decide(read)
        self._append([(row, [token]) for row, token in chosen])

    def _decide(self, read: ReadPiece) -> None:
        """Let the rows whose prompts the base has read know what their switches say.

        What is off runs as the base from what was read. What is on begins anew; what the base read is kept
        for the next question of the conversation. Rows run already, so nothing here may fail.
        """
        for place, (row, _) in enumerate(read.piece):
            is_tuned = read.decided.get(row)
            if is_tuned is None:
                continue
            cost, name = row.cost, row.request.adapter
            row.decide(is_tuned=is_tuned)
            self._committed += row.cost - cost
            on, off = self.switched.get(name, (0, 0))
            # Replaced, as other threads may be reading it.
            self.switched = {**self.switched, name: (on + is_tuned, off + (not is_tuned))}
            if is_tuned and self._kept is not None:
                layers = partial(copied, read.layers[place])
                self._store(BASE.cache_key, tuple(row.own), self._room_to_keep(), layers)
                # Those that follow it as the base do not wait for what it will read with its adapter.
                for each in (row, *(each for each in self._reader.rows if each.leader is row)):
                    self._find_cache(each)

    def _step(self, running: RunningRows, lora: HeldLora | None) -> None:
        """Read one token per row and append the ones that follow."""
        # First: where memory does not suffice for it, nothing has moved.
        running.states.tighten(keep_room=bool(self._waiting or self._reader.rows))
        drafts = self.drafter.drafts(running)
        with active_layers(lora):
            chosen = step_rows(self._model, self._chooser, running, drafts)
        self.drafter.note(chosen, drafts)
        self._append(chosen)

    def _append(self, chosen: Sequence[tuple[Row, Sequence[NextToken]]]) -> None:
        """Append its tokens to every row and hand out what that adds to its answer."""
        for row, tokens in chosen:
            for token in tokens:
                if row.finish_reason is not None:
                    break  # what was chosen behind its end
                self._append_one(row, token)

    def _append_one(self, row: Row, token: NextToken) -> None:
        if isinstance(token, GlmtuneError):
            row.is_damaged = True
            self._fail(row, token)
            return
        self.num_new_tokens += 1
        try:
            piece = row.take(token)
        except Exception as error:
            self._fail(row, error)
            return
        if piece.finish_reason is not None:
            self._leave(row)
        self._give(row, piece)

    # ---- rows that leave

    def _leave(self, row: Row) -> None:
        """Take a row out, wherever it is; what was read of it is kept."""
        for running in self._running.values():
            if row in running:
                self._keep(row, running)
                running.remove(row, is_damaged=row.is_damaged)
                break
        else:
            if row in self._waiting:
                self._waiting.remove(row)
                self._chooser.remove(row.number)  # there, if it was sent back
                return
            self._reader.rows.remove(row)
        self._committed -= row.cost
        self._chooser.remove(row.number)
        row.forget_reading()

    def _keep(self, row: Row, running: RunningRows) -> None:
        """Keep the cache of a row that leaves, where it is worth it and there is room."""
        if self._kept is None or row.num_shared or row.is_damaged:
            return
        tokens, copy = tuple(row.own[: running.length(row)]), partial(running.keys_values, row)
        self._store(row.adapter.cache_key, tokens, self._room_to_keep(row), copy)

    def _store(
        self, key: str, tokens: tuple[int, ...], room: int, copy: Callable[[], tuple[KeysValues, ...]]
    ) -> None:
        assert self._kept is not None
        if not MIN_REUSED_TOKENS <= len(tokens) <= room or self._kept.holds(key, tokens):
            return
        self._kept.shrink(room - len(tokens))
        if layers := copy_if_room(copy):
            self._kept.put(key, tokens, layers, max_tokens=room)
        else:
            self._kept.shrink(0)

    def _give(self, row: Row, piece: AnswerPiece) -> None:
        """Hand out a piece; with the last one the row is over."""
        if piece.finish_reason is not None:
            self._ended.append(row)
            self.drafter.end(row)
        try:
            row.give(piece)
        except Exception:
            LOGGER.exception("Whoever takes the answer of a request failed; the request ends.")
            self.end(row, "cancelled")

    def _fail(self, row: Row, error: Exception) -> None:
        """End a row that something went wrong with; the others go on."""
        if self._raises_errors:
            raise error
        LOGGER.error("A request failed: %s", error)
        self.end(row, "failed", str(error) or type(error).__name__)

    # ---- when something goes wrong

    def _attempt(
        self, compute: Callable[[], None], rows: Sequence[Row], retreat: Callable[[Sequence[Row]], None]
    ) -> None:
        """Compute; where memory runs out, ask for less from now on; what else fails ends the rows.

        The next step tries again: no row is lost, and none is generated twice.
        """
        failure: Exception | None = None
        try:
            with torch.no_grad():
                compute()
            return
        except Exception as error:
            if not is_out_of_memory(error):
                failure = error
        # Not in the except block: while the error lives, its traceback keeps the tensors of what failed.
        if failure is None:
            release_memory()
            if self._kept is not None and self._kept.num_tokens:  # of no use to anybody who is waiting now
                self._kept.shrink(0)
            else:
                retreat(rows)
            return
        if self._raises_errors:
            raise failure
        LOGGER.error("A pass of %d requests failed.", len(rows), exc_info=failure)
        for row in rows:
            self._fail(row, failure)

    def _retreat_from_reading(self, rows: Sequence[Row]) -> None:
        """Read half as many prompts at once; if it was one, wait until running rows have ended."""
        if self._reader.read_less(rows):
            return
        if self._num_running:
            self._budget.rows = self._num_running
            self._send_back(list(self._reader.rows))
        else:
            self._fail(rows[0], no_memory(len(rows[0].prompt)))

    def _retreat_from_step(self, rows: Sequence[Row]) -> None:
        """Send the half of the rows that got least far back to the queue; what they have is kept.

        What goes back must be read again, prompt and generated tokens, so those with the fewest cost least;
        and those that got far are the ones that will soon end and make room.
        """
        running = self._running_rows
        if len(running) == 1 and self._reader.rows:
            self._budget.rows = 1
            self._send_back(list(self._reader.rows))
            return
        if len(running) == 1:
            self._fail(rows[0], no_memory(len(rows[0].prompt) + len(rows[0].generated)))
            return
        self._budget.halve(len(running))
        running.sort(key=lambda row: -len(row.generated))
        self._send_back([*running[self._budget.rows :], *self._reader.rows])

    def _send_back(self, rows: Sequence[Row]) -> None:
        """Put rows to the front of the queue, in the order in which they came."""
        for row in rows:
            for running in self._running.values():
                if row in running:
                    running.remove(row)
            if row in self._reader.rows:
                self._reader.rows.remove(row)
            self._committed -= row.cost
            row.forget_reading()
        self._waiting.extendleft(sorted(rows, key=lambda row: -row.number))
