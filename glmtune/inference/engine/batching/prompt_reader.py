"""Reading the prompts of admitted rows, a piece at a time: which rows, how many tokens, what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from glmtune.inference.engine.adapters import active_layers
from glmtune.inference.engine.attention import KeysValues
from glmtune.inference.engine.batching.row import Row
from glmtune.inference.engine.budget import Budget
from glmtune.inference.engine.model import EngineModel, joined
from glmtune.inference.engine.prompt_cache import PromptCache
from glmtune.inference.engine.sampling.choose import prompt_logprobs
from glmtune.inference.engine.states.rows import NewRow
from glmtune.inference.requests.request import TokenLogprob

SCORED_TOKENS = 64
"""Prompt tokens scored at once: logits over a vocabulary of 150,000 take 40 MB then, whatever the length."""

MIN_PIECE_TOKENS = 16
"""A prompt is not cut smaller, however little memory there is."""

Piece = Sequence[tuple[Row, int]]
"""Rows that are read together, and how many tokens of each."""


@dataclass(frozen=True, slots=True)
class ReadPiece:
    """What reading a piece gave; no row knows of it yet.

    Attributes:
        piece: which rows were read, and how far.
        layers: per row the keys and values of all its own tokens that are read now.
        positions: per row those of the token that follows, and what each further one adds.
        ready: the rows that are read to their end.
        new_rows: what these bring into the batch.
        logits: of their next tokens, ``[ready, vocab]``; None where none is ready.
        decided: of rows that the base has read for their switch to decide, whether they are tuned; those that
            are go back to the first token, and are not ready.
    """

    piece: Piece
    layers: list[tuple[KeysValues, ...]]
    positions: list[list[list[int]]]
    ready: list[Row]
    new_rows: list[NewRow]
    logits: Tensor | None
    decided: Mapping[Row, bool]


class PromptReader:
    """The rows whose prompts are being read.

    Attributes:
        rows: those, the next one first.
    """

    def __init__(self, model: EngineModel, budget: Budget, piece_tokens: int | None) -> None:
        """Start without rows; ``piece_tokens`` see `ContinuousBatch`."""
        self.rows: list[Row] = []
        self._model, self._budget, self._piece_tokens = model, budget, piece_tokens
        self._shared = PromptCache(model)

    def next_piece(self, *, others_run: bool) -> Piece:
        """Return what to read next.

        A prompt that is longer than what is read at once is read alone and, unless it is ChatGLM-6B's, in
        pieces: with a prefix in front, attention takes a mask of its tokens times all that they see. Others
        are read together with the first one where they may be: through the same layers, behind the same
        shared prompt, and at little waste.

        Args:
            others_run: whether rows stand still meanwhile; else a piece may be as large as is good for speed.
        """
        rows = [row for row in self.rows if row.leader is None]
        first, limit = rows[0], self._budget.read_tokens
        if self._piece_tokens is not None and others_run:
            limit = min(limit, self._piece_tokens)
        if self._model.can_share and first.num_unread > limit:
            return [(first, limit)]
        key = (first.adapter.lora, first.group)
        together = [
            row
            for row in rows
            if row is first or ((row.adapter.lora, row.group) == key and row.num_unread <= limit)
        ]
        count = self._budget.rows_to_read(
            [row.num_unread for row in together],
            [row.num_shared + row.num_read + row.adapter.num_columns for row in together],
            limit,
        )
        return [(row, row.num_unread) for row in together[:count]]

    def read(self, piece: Piece) -> ReadPiece:
        """Read a piece; nothing is changed, so that it may be read again if memory ends here or later."""
        rows = [row for row, _ in piece]
        done = [place for place, (row, count) in enumerate(piece) if count == row.num_unread]
        with active_layers(rows[0].adapter.lora):
            # In here too, so that what is shared is read through the layers of its rows.
            shared = self._shared.get(rows[0].prompt[: rows[0].num_shared])
            before = [row.before(shared) for row in rows]
            if all(not row.layers and row.adapter.prefix is rows[0].adapter.prefix for row in rows):
                before = before[:1]  # the same in front of all
            parts = [row.own[row.num_read : row.num_read + count] for row, count in piece]
            scored = any(row.request.sampling.prompt_logprobs is not None for row in rows)
            reading = self._model.read(parts, before, keep=True, every=scored)
            for place, (row, count) in enumerate(piece):
                if scored:
                    self._score(row, reading.hidden_BSD[place, :count])
            decided = _decisions([(rows[place], reading.last_hidden_BD[place]) for place in done])
            done = [place for place in done if not decided.get(rows[place])]
            logits = self._model.unchecked_logits(reading.last_hidden_BD[done]) if done else None
        layers = [joined(row.layers, reading.layers_of(place)) for place, row in enumerate(rows)]
        new_rows = [
            NewRow(
                layers=layers[place],
                length=rows[place].num_read + rows[place].num_unread,
                max_length=rows[place].max_length,
                prefix=rows[place].adapter.prefix,
                shared=shared if shared.token_ids else None,
            )
            for place in done
        ]
        ready = [rows[place] for place in done]
        return ReadPiece(piece, layers, reading.positions.tolist(), ready, new_rows, logits, decided)

    def settle(self, read: ReadPiece) -> None:
        """Let the rows know what was read; those that are read to their end are no longer among them."""
        for place, (row, count) in enumerate(read.piece):
            self.rows.remove(row)
            if row in read.ready:
                row.start(*read.positions[place])
            elif read.decided.get(row):
                self.rows.append(row)  # read anew, with its adapter
            else:  # behind the others, so that a long prompt does not keep short ones waiting
                row.layers, row.num_read = read.layers[place], row.num_read + count
                self.rows.append(row)

    def read_less(self, rows: Sequence[Row]) -> bool:
        """Read less at once from now on, as memory did not suffice for these; False: there is no less."""
        if len(rows) > 1:
            self._budget.halve_reading(len(rows), max(row.num_unread for row in rows))
            return True
        piece = min(self._budget.read_tokens, rows[0].num_unread)
        if not self._model.can_share or piece <= MIN_PIECE_TOKENS:
            return False
        self._budget.halve_reading(2, piece // 2)
        return True

    def _score(self, row: Row, hidden_SD: Tensor) -> None:
        """Note the log-probabilities of prompt tokens, where a request asks for them."""
        top = row.request.sampling.prompt_logprobs
        if top is None or row.generated:
            return
        first = row.num_read + 1  # the hidden state of a token tells the one behind it
        scores = row.prompt_scores[:first] or [TokenLogprob(row.prompt[0], None)]
        for start in range(0, len(hidden_SD), SCORED_TOKENS):
            ids = row.prompt[first + start : first + min(len(hidden_SD), start + SCORED_TOKENS)]
            if ids:
                logits = self._model.logits(hidden_SD[start : start + len(ids)])
                scores += prompt_logprobs(logits, ids, top)
        row.prompt_scores = scores


def _decisions(read: Sequence[tuple[Row, Tensor]]) -> dict[Row, bool]:
    """Let switches decide for rows whose prompts the base has read, each by its last hidden state ``[D]``."""
    waiting = [(row, hidden_D) for row, hidden_D in read if row.undecided is not None]
    found: dict[Row, bool] = {}
    for row, hidden_D in waiting:
        switch = row.undecided.switch if row.undecided is not None else None
        assert switch is not None, "without a switch nothing is undecided"
        found[row] = bool(switch.decide(hidden_D[None])[0])
    return found
