"""Drafts by a smaller model: what it would write next, for the rows of a batch.

The smaller model reads what a row has so far behind its own keys and values, and writes some tokens::

    row             q q q a b            b is chosen, and read next
    read here       q q q a | x y        x and y were drafted last time: b is not x
    kept            q q q a |
    this time       q q q a   b -> c     reads what is new, the last of which drafts a token
                              c -> d     and its own drafts, one after the other, all rows at once

Its keys and values go back to where the row and its drafts part, so a draft that was right is not read again.
It has no prefix, LoRA or switch of a row: with these in front its drafts are right less often, that is all.

Source:
    Leviathan et al. 2022, arXiv:2211.17192, section 2, with the likeliest tokens as drafts, which count
    if they are what the large model chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from glmtune.inference.engine.attention import KeysValues
from glmtune.inference.engine.batching.row import Row
from glmtune.inference.engine.batching.running_rows import RunningRows
from glmtune.inference.engine.model import EngineModel, joined
from glmtune.inference.engine.reading import Before
from glmtune.inference.engine.states.rows import NewRow

READ_TOKENS = 1024
"""Tokens of a prompt read in one pass; ChatGLM-6B's are read whole."""


@dataclass(eq=False)
class _Shadow:
    """A row as the smaller model has it.

    Attributes:
        row: what `RunningRows` steps with.
        read: its tokens, and drafts behind them, whose keys and values are held.
    """

    row: Row
    read: list[int] = field(default_factory=list[int])


class ModelDrafts:
    """The smaller model, with its own keys and values for the rows that it has drafted for."""

    def __init__(self, model: EngineModel) -> None:
        """Take the model; it has to have the vocabulary of the large one."""
        self._model = model
        self._running = RunningRows("plain")
        self._shadows: dict[Row, _Shadow] = {}

    def drafts(self, rows: Mapping[Row, int]) -> dict[Row, tuple[int, ...]]:
        """Return what may follow the last token of each row.

        Args:
            rows: how many tokens to draft for each, at least 1.
        """
        self._running.states.tighten(keep_room=False)
        for row in rows:
            if row not in self._shadows:
                self._read(row)
        last = self._catch_up(rows)
        found: dict[Row, list[int]] = {row: [last[row]] for row in rows}
        while any(len(tokens) < rows[row] for row, tokens in found.items()):
            for row, tokens in found.items():
                shadow = self._shadows[row]
                if len(tokens) < rows[row]:
                    _expect(shadow, tokens[-1])
            order, hidden_BQD = self._running.step(self._model, {})
            chosen = self._likeliest(hidden_BQD[:, 0])
            owners = {shadow.row: row for row, shadow in self._shadows.items()}
            counts: list[int] = []
            for shadow_row, token in zip(order, chosen, strict=True):
                row = owners[shadow_row]
                goes_on = row in found and len(found[row]) < rows[row]
                counts.append(int(goes_on))
                if goes_on:
                    self._shadows[row].read.append(shadow_row.last_token)
                    found[row].append(token)
            self._running.advance(counts)
        return {row: tuple(tokens) for row, tokens in found.items()}

    def forget(self, row: Row) -> None:
        """Let go of a row, if it is known."""
        if (shadow := self._shadows.pop(row, None)) is not None:
            self._running.remove(shadow.row)

    def _read(self, row: Row) -> None:
        """Read all of a row but its last token."""
        ids = [*row.prompt, *row.generated][:-1]
        step = READ_TOKENS if self._model.can_share else len(ids)
        layers: tuple[KeysValues, ...] = ()
        positions: list[list[list[int]]] = []
        for start in range(0, len(ids), step):
            reading = self._model.read([ids[start : start + step]], [Before(layers)], keep=True)
            layers = joined(layers, reading.layers_of(0))
            positions = reading.positions.tolist()
        request = replace(row.request, prompt_ids=tuple(ids), text_stream=None)
        shadow = _Shadow(Row(row.number, request, limit=row.limit), ids)
        new = NewRow(layers=layers, length=len(ids), max_length=len(row.prompt) + row.limit)
        self._running.add([shadow.row], [new])
        shadow.row.start(*positions[0])
        self._shadows[row] = shadow

    def _catch_up(self, rows: Mapping[Row, int]) -> dict[Row, int]:
        """Read what is new of all rows, those that are drafted for or not; return what follows."""
        new: dict[Row, list[int]] = {}
        for row, shadow in self._shadows.items():
            ids = [*row.prompt, *row.generated]
            kept = _num_common(shadow.read, ids[:-1])
            self._go_back(shadow, len(shadow.read) - kept)
            _expect(shadow, ids[kept])
            new[shadow.row] = ids[kept + 1 :]
        order, hidden_BQD = self._running.step(self._model, new)
        ends = [len(new[shadow_row]) for shadow_row in order]
        owners = {shadow.row: row for row, shadow in self._shadows.items()}
        places = [place for place, each in enumerate(order) if owners[each] in rows]
        chosen = self._likeliest(hidden_BQD[places, [ends[place] for place in places]])
        for shadow_row in order:
            self._shadows[owners[shadow_row]].read += [shadow_row.last_token, *new[shadow_row]]
        self._running.advance([1 + end for end in ends])
        return {owners[order[place]]: token for place, token in zip(places, chosen, strict=True)}

    def _go_back(self, shadow: _Shadow, count: int) -> None:
        """Take back what was read last; it is written over."""
        if count:
            del shadow.read[-count:]
            self._running.take_back(shadow.row, count)

    def _likeliest(self, hidden_BD: Tensor) -> list[int]:
        return self._model.unchecked_logits(hidden_BD).argmax(dim=-1).tolist()


def _expect(shadow: _Shadow, token: int) -> None:
    """Let a token be the one that is read next."""
    shadow.row.generated = [*shadow.read[len(shadow.row.prompt) :], token]


def _num_common(read: Sequence[int], ids: Sequence[int]) -> int:
    """Count the tokens that both begin with."""
    count = min(len(read), len(ids))
    return next((place for place in range(count) if read[place] != ids[place]), count)
