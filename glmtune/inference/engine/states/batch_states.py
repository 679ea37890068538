"""The keys and values of a generating batch: rows of all lengths, prefixes, shared prompts held once.

::

    bank of long rows    row 7   P P q q q q q q q q a a a a a a a a a a .
    bank of short rows   row 2   q q q a a .
                         row 9   P P P q a .
                         row 4   q a a .              <- shared prompt of rows 4 and 9, held once
    forward pass         7 2 9 4: one batch for all that is not attention, in the order of the banks

In each layer every bank attends over the columns of its own longest row. Its rows are a slice of the batch,
so nothing is gathered. What rows share is attended to apart and merged in (`decomposed`).

Shapes: B rows of the forward pass, n rows of a bank, N query heads, K key/value heads, Q new tokens,
G = N / K * Q queries per key head, C columns, H head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from glmtune.inference.engine.attention import KeysValues
from glmtune.inference.engine.states.bank import Bank
from glmtune.inference.engine.states.bank_step import AttachedPrefix, BankStep, attend_apart, attend_bank
from glmtune.inference.engine.states.decomposed import Segment
from glmtune.inference.engine.states.gated import GatedRows, gated_rows
from glmtune.inference.engine.states.partition import bank_cost, partition
from glmtune.inference.engine.states.rows import NewRow, Row
from glmtune.models.architectures.kv_cache import COLUMN_CHUNK

STEPS_TO_PAY = 32
"""Rows change banks where that saves more within so many steps than it costs. They will rarely stay alike
for longer: others come and go."""

COPY_COST = 4
"""Reading a column for attention is 1; copying it to another place reads and writes, mostly cold memory."""

STEPS_BETWEEN_PLANS = 16
"""Rows grow by a token a step, so banks that were right are right for a while."""

_Moved = tuple[list[BankStep], list[Segment], list[GatedRows]]


class BatchStates:
    """The states of a batch whose rows come, grow and go; an `AttentionStates`.

    Rows that share a bank have room for the longest of them, and some for tokens to come. Where that would be
    more than ``limit``, rows are laid out anew by what each may come to need, at worst in banks of their own.

    Attributes:
        limit: columns that there may be memory for between steps; None: any number. What is less than all
            rows may come to need together cannot be kept to.

    A lack of memory in `add`, `tighten` or `open_columns` leaves rows and order as they were.
    """

    def __init__(self, kv_cache: str = "plain") -> None:
        """Start without rows.

        Args:
            kv_cache: how keys and values are kept, one of `glmtune.models.settings.KV_CACHES`.
        """
        self.limit: int | None = None
        self._kv_cache = kv_cache
        self._banks: list[Bank] = []
        self._next_id = 0
        self._heads_per_key = 1
        self._device = torch.device("cpu")
        self._dtype = torch.float32
        self._bank_cost = 0.0  # in columns
        self._segments: list[Segment] | None = None  # None: to be found anew
        self._gated: list[GatedRows] = []  # found with the segments
        self._steps: list[BankStep] = []
        # Of a model that is split: all three for the layers of other devices, moved once a pass for each.
        self._elsewhere: dict[torch.device, _Moved] = {}
        self._num_tokens = 1
        self._steps_to_plan = 0
        self._is_tight = False  # rows have all the room that they may come to need

    # ---- rows ----

    def add(self, rows: Sequence[NewRow]) -> list[int]:
        """Put rows that were just read into the batch; those that are there may change places.

        Returns:
            A number for each row, which stays until it is removed.
        """
        if not rows:
            return []
        self._learn_shape(rows[0].layers)
        made = [self._row(place, new) for place, new in enumerate(rows)]
        chosen: list[tuple[Bank, list[int]]] = []
        for places in partition([row.columns + 1 for row in made], self._bank_cost):
            bank = self._bank_for([made[place] for place in places], [bank for bank, _ in chosen])
            if bank is None:
                bank = Bank.like(rows[0].layers, self._kv_cache)
            chosen.append((bank, places))
        joining = {id(bank): [made[place] for place in places] for bank, places in chosen}
        banks = [*self._banks, *(bank for bank, _ in chosen if bank not in self._banks)]
        if self.limit is not None and _grown(banks, joining) > self.limit:
            chosen = self._tight_places(made, rows[0].layers)
        else:
            for bank, _ in chosen:
                _make_room(bank, joining[id(bank)])
        for bank, places in chosen:
            for offset, place in enumerate(places):
                bank.write(len(bank.rows) + offset, rows[place])
        # Last, so that a lack of memory above leaves the batch as it was.
        for bank, places in chosen:
            bank.rows += [made[place] for place in places]
            if bank not in self._banks:
                self._banks.append(bank)
        self._next_id += len(rows)
        self._changed()
        return [row.row_id for row in made]

    def remove(self, row_ids: Iterable[int]) -> None:
        """Take rows out; the others may change places. Their memory is kept for others until `tighten`."""
        for bank, row in [self._find(row_id) for row_id in row_ids]:
            bank.drop(row)
        self._changed()

    def blank(self, row_id: int) -> None:
        """Zero a row's memory, before it is removed: NaN would spread to rows that are put there later.

        Columns that a row does not see have weight 0, and 0 times NaN is NaN.
        """
        bank, row = self._find(row_id)
        slot = bank.rows.index(row)
        for tensor in bank.tensors:
            tensor[slot].zero_()

    def tighten(self, *, keep_room: bool) -> None:
        """Put rows into other banks where that soon pays, and give back memory that is not used.

        To be called between steps, before `order` is read; cheap where there is nothing to do.

        Args:
            keep_room: whether rows are waiting: then memory stays where rows are.
        """
        if self._steps_to_plan <= 0:
            self._regroup()
            self._steps_to_plan = STEPS_BETWEEN_PLANS
        self._banks = [bank for bank in self._banks if bank.rows]
        if not keep_room and not self._is_tight:
            for bank in self._banks:
                if bank.is_roomy:
                    bank.shrink()
        if not self.fits() and not self._is_tight:
            self._lay_out_tightly([], None)

    @property
    def order(self) -> list[int]:
        """Number of the row at each place of the next forward pass.

        It changes with `add`, `remove` and `tighten`, never in between. No place is empty.
        """
        return [row.row_id for row in self._rows]

    def keys_values(self, row_id: int) -> tuple[KeysValues, ...]:
        """Return a copy of a row's own keys and values per layer, each ``[1, K, S, H]``."""
        bank, row = self._find(row_id)
        return bank.own_tokens(row)

    def length(self, row_id: int) -> int:
        """Return the number of a row's own tokens."""
        return self._find(row_id)[1].length

    def fits(self, num_tokens: int = 1) -> bool:
        """Whether a step with so many new tokens of every row keeps to the limit."""
        return self.limit is None or _grown(self._banks, {}, num_tokens) <= self.limit

    @property
    def held_tokens(self) -> int:
        """Columns there is memory for, those of prefixes included."""
        return sum(bank.room for bank in self._banks)

    @property
    def held_bytes(self) -> int:
        """Memory taken."""
        return sum(tensor.nbytes for bank in self._banks for tensor in bank.tensors)

    # ---- a forward pass ----

    def open_columns(self, num_tokens: int = 1) -> Tensor:
        """Make room for new tokens of every row; doing it again, after a step that failed, is the same.

        Args:
            num_tokens: new tokens per row, Q.

        Returns:
            What the model takes for a mask, ``[B, 1, Q, 1]``, and hands back to `attend`, which has its own.
        """
        for bank in self._banks:
            _make_room(bank, [], num_tokens)
        steps = self._bank_steps(num_tokens)
        if self._segments is None:
            self._segments = self._find_segments()
            self._gated = gated_rows([row.gated for row in self._rows], self._device)
        self._steps, self._num_tokens = steps, num_tokens
        self._elsewhere = {}
        return torch.zeros(len(self._rows), 1, num_tokens, 1, device=self._device, dtype=self._dtype)

    def attend(
        self,
        layer: int,
        query: Tensor,
        own: KeysValues,
        *,
        mask: Tensor | None,
        prefix: KeysValues | None,
        prefix_strength: float = 1.0,
        scaling: float,
    ) -> Tensor:
        """Attend with Q queries per row, causally among themselves; see `AttentionStates`."""
        del mask
        num_keys, width = own[0].shape[1::2]
        if query.shape[1] != num_keys * self._heads_per_key:  # known from the first step on
            self._heads_per_key = query.shape[1] // num_keys
            self._steps, self._elsewhere = self._bank_steps(self._num_tokens), {}
        query_BKGH = query.reshape(len(query), num_keys, -1, width)
        steps, segments, gated = self._steps_on(query.device)
        for step in steps:
            for states, new in zip(step.bank.layers[layer], own, strict=True):
                states.write(step.where, new[step.places].transpose(1, 2))
        if prefix is None and not segments:
            parts = [
                attend_bank(step, layer, query_BKGH, scaling, num_tokens=self._num_tokens) for step in steps
            ]
            mixed_BKGH = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            attached = None if prefix is None else AttachedPrefix(*prefix, prefix_strength)
            mixed_BKGH = attend_apart(steps, segments, layer, query_BKGH, attached, scaling).to(query.dtype)
        mixed_BQNH = mixed_BKGH.reshape(query.shape).transpose(1, 2)
        for rows in gated:
            mixed_BQNH = rows.add(mixed_BQNH, query, layer, scaling)
        return mixed_BQNH

    def advance(self, counts: Sequence[int] | None = None) -> None:
        """Count the tokens just read; until then a step can be repeated, over the same columns.

        Args:
            counts: how many of the new tokens stay, per place; None: all.
        """
        rows = self._rows
        for row, count in zip(rows, counts or [self._num_tokens] * len(rows), strict=True):
            row.length += count
        self._steps_to_plan -= 1

    def take_back(self, row_id: int, count: int) -> None:
        """Let the last own tokens of a row be none, as if they had not been counted."""
        self._find(row_id)[1].length -= count

    # ---- attention ----

    def _bank_steps(self, num_tokens: int) -> list[BankStep]:
        steps: list[BankStep] = []
        start = 0
        for bank in self._banks:
            if bank.rows:
                places = slice(start, start + len(bank.rows))
                steps.append(self._bank_step(bank, places, num_tokens))
                start = places.stop
        return steps

    def _bank_step(self, bank: Bank, places: slice, num_tokens: int) -> BankStep:
        """Find where a bank's new tokens go, and what each of them sees."""
        num_columns = bank.columns + num_tokens
        numbers = [[row.columns for row in bank.rows], [row.num_prefix for row in bank.rows]]
        in_use_n, prefix_n = torch.tensor(numbers, device=self._device)
        last_nQ = in_use_n[:, None] + torch.arange(num_tokens, device=self._device)
        column_C = torch.arange(num_columns, device=self._device)
        mask_nQC = torch.zeros(*last_nQ.shape, num_columns, device=self._device)
        if any(row.strength != 1 for row in bank.rows):
            strengths = torch.tensor([math.log(row.strength) for row in bank.rows], device=self._device)
            is_prefix_nC = column_C < prefix_n[:, None]
            mask_nQC += torch.where(is_prefix_nC, strengths[:, None], 0.0)[:, None]
        mask_nQC.masked_fill_(column_C > last_nQ[..., None], -torch.inf)
        heads = self._heads_per_key
        # The queries of a key head in one matrix: faster than PyTorch's own grouped heads, in bfloat16 on a
        # CPU more than ten times.
        mask_nGC = mask_nQC[:, None].expand(-1, heads, -1, -1).reshape(len(bank.rows), -1, num_columns)
        # The kernels of accelerators want the mask in the type of the query. A CPU's take float32 too, but
        # beside a query in float64 they read it wrongly and say nothing (PyTorch 2.13, from 16 columns on).
        if self._device.type != "cpu" or self._dtype == torch.float64:
            mask_nGC = mask_nGC.to(self._dtype)
        slots_n1 = torch.arange(len(bank.rows), device=self._device)[:, None]
        where = (slots_n1, slice(None), last_nQ)
        return BankStep(bank, places, num_columns, where, mask_nGC[:, None])

    def _steps_on(self, device: torch.device) -> _Moved:
        """Return what banks do in a layer on this device, what rows share there, and their gated prefixes."""
        if device == self._device:
            return self._steps, self._segments or [], self._gated
        if device not in self._elsewhere:
            steps = [step.to(device) for step in self._steps]
            segments = [segment.to(device) for segment in self._segments or ()]
            self._elsewhere[device] = steps, segments, [rows.to(device) for rows in self._gated]
        return self._elsewhere[device]

    def _find_segments(self) -> list[Segment]:
        """Find the shared prompts and the places of their rows."""
        members: dict[int, list[int]] = {}
        prompts = {}
        for place, row in enumerate(self._rows):
            if row.shared is not None:
                prompts[id(row.shared)] = row.shared
                members.setdefault(id(row.shared), []).append(place)
        num_rows = len(self._rows)
        return [
            Segment(
                prompts[key], None if len(places) == num_rows else torch.tensor(places, device=self._device)
            )
            for key, places in members.items()
        ]

    # ---- which row is in which bank ----

    @property
    def _rows(self) -> list[Row]:
        return [row for bank in self._banks for row in bank.rows]

    def _find(self, row_id: int) -> tuple[Bank, Row]:
        for bank in self._banks:
            for row in bank.rows:
                if row.row_id == row_id:
                    return bank, row
        raise KeyError(f"no row {row_id} in the batch, which holds {self.order}")

    def _changed(self) -> None:
        """Forget what depends on which rows there are."""
        self._segments, self._steps, self._steps_to_plan = None, [], 0
        self._elsewhere = {}
        self._is_tight = False

    def _learn_shape(self, layers: Sequence[KeysValues]) -> None:
        keys = layers[0][0]
        self._device, self._dtype = keys.device, keys.dtype
        self._bank_cost = bank_cost(2 * keys.shape[1] * keys.shape[3], keys.device.type)

    def _row(self, place: int, new: NewRow) -> Row:
        num_prefix = 0 if new.prefix is None else new.prefix.num_columns
        return Row(
            row_id=self._next_id + place,
            length=new.length,
            max_columns=num_prefix + max(new.length, new.max_length),
            num_prefix=num_prefix,
            strength=1.0 if new.prefix is None else new.prefix.strength,
            shared=new.shared if new.shared is not None and new.shared.layers else None,
            gated=new.prefix if new.prefix is not None and new.prefix.gates is not None else None,
        )

    def _bank_for(self, rows: Sequence[Row], taken: Sequence[Bank]) -> Bank | None:
        """Return the bank in which new rows cost least; None: one of their own."""
        columns = max(row.columns for row in rows)
        best, least = None, self._bank_cost
        for bank in self._banks:
            wider = bank.columns - columns
            cost = len(rows) * wider if wider > 0 else -wider * len(bank.rows)
            if cost < least and bank not in taken:
                best, least = bank, cost
        return best

    def _regroup(self) -> None:
        """Move rows into the banks that cost least, where that pays."""
        rows, sources = self._rows, [bank for bank in self._banks for _ in bank.rows]
        groups = partition([row.columns + 1 for row in rows], self._bank_cost)
        now = sum(self._bank_cost + len(bank.rows) * bank.columns for bank in self._banks if bank.rows)
        planned = sum(self._bank_cost + len(group) * rows[group[0]].columns for group in groups)
        if planned >= now or self._is_tight:
            return
        widest = [len(group) * (rows[group[0]].columns + COLUMN_CHUNK) for group in groups]
        if self.limit is not None and sum(widest) > self.limit:
            return
        # Each group takes the bank in which most of its columns lie already.
        free, moves = list(self._banks), []
        targets: list[Bank] = []
        for group in groups:
            shares = [sum(rows[place].columns for place in group if sources[place] is bank) for bank in free]
            target = free.pop(shares.index(max(shares))) if any(shares) else self._banks[0].sibling()
            targets.append(target)
            moves += [(place, target) for place in group if sources[place] is not target]
        moved = sum(rows[place].columns for place, _ in moves)
        if (now - planned) * STEPS_TO_PAY <= moved * COPY_COST:
            return
        for target in targets:  # all the memory first; what follows takes none
            _make_room(target, [rows[place] for place, other in moves if other is target])
        for place, target in moves:
            target.take(rows[place], sources[place])
        self._banks = [*targets, *(bank for bank in self._banks if bank.rows and bank not in targets)]
        self._segments, self._steps = None, []

    # ---- where memory is short ----

    def _tight_places(
        self, made: Sequence[Row], layers: Sequence[KeysValues]
    ) -> list[tuple[Bank, list[int]]]:
        """Find banks for new rows that take no more than these may come to need."""
        assert self.limit is not None
        self._banks = [bank for bank in self._banks if bank.rows]
        if sum(row.most_columns for row in made) + self.held_tokens > self.limit:
            return self._lay_out_tightly(made, layers)
        chosen: list[tuple[Bank, list[int]]] = []
        for places in partition([row.most_columns for row in made], 0):
            bank = Bank.like(layers, self._kv_cache)
            bank.reserve_exactly(len(places), made[places[0]].most_columns)
            chosen.append((bank, places))
        return chosen

    def _lay_out_tightly(
        self, made: Sequence[Row], layers: Sequence[KeysValues] | None
    ) -> list[tuple[Bank, list[int]]]:
        """Move all rows into as few banks as keep to the limit, with all the room they may come to need.

        Until rows come or go, nothing has to be copied again. For a moment old and new banks are both there.

        Args:
            made: rows to come, which get places as well.
            layers: what one of them brings.

        Returns:
            The banks of the rows to come, and which these are.
        """
        assert self.limit is not None
        sources = [bank for bank in self._banks for _ in bank.rows]
        rows = [*self._rows, *made]
        needed = [row.most_columns for row in rows]
        cost = self._bank_cost
        groups = partition(needed, cost)
        while cost and sum(len(group) * needed[group[0]] for group in groups) > self.limit:
            cost = cost / 4 if cost > 1 else 0
            groups = partition(needed, cost)
        targets: list[Bank] = []
        for group in groups:  # all the memory first; what follows takes none
            target = Bank.like(layers, self._kv_cache) if layers else self._banks[0].sibling()
            target.reserve_exactly(len(group), needed[group[0]])
            targets.append(target)
        chosen: list[tuple[Bank, list[int]]] = []
        for target, group in zip(targets, groups, strict=True):
            for place in group:
                if place < len(sources):
                    target.take(rows[place], sources[place])
            new = [place - len(sources) for place in group if place >= len(sources)]
            if new:
                chosen.append((target, new))
        self._banks = [bank for bank in targets if bank.rows]
        self._changed()
        self._is_tight, self._steps_to_plan = True, STEPS_BETWEEN_PLANS
        return chosen


def _make_room(bank: Bank, new_rows: Sequence[Row], num_tokens: int = 1) -> None:
    """Let a bank hold its rows and some new ones, with room for new tokens of each."""
    bank.reserve(*_need(bank, new_rows, num_tokens))


def _need(bank: Bank, new_rows: Sequence[Row], num_tokens: int) -> tuple[int, int, int]:
    """Return rows, columns, and the most columns that these will ever need."""
    rows = [*bank.rows, *new_rows]
    needed = max((row.columns for row in rows), default=0) + num_tokens
    return len(rows), needed, max((row.max_columns for row in rows), default=0)


def _grown(banks: Iterable[Bank], new_rows: Mapping[int, Sequence[Row]], num_tokens: int = 1) -> int:
    """Return the columns that there is memory for once every bank has room for what it is to hold.

    Args:
        banks: all of them.
        new_rows: rows to come by the `id` of their bank.
        num_tokens: new tokens of every row.
    """
    rooms = (bank.grown_room(*_need(bank, new_rows.get(id(bank), ()), num_tokens)) for bank in banks)
    return sum(slots * columns for slots, columns in rooms)
