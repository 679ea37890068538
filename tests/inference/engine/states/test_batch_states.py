"""Rows of all lengths, prefixes, strengths and shared prompts in one batch: every output is the reference's."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from glmtune.inference.engine.prompt_groups import SharedPrompt
from glmtune.inference.engine.states import batch_states
from glmtune.inference.engine.states.rows import PrefixStates
from glmtune.models.architectures import kv_cache
from tests.inference.engine.states.reference import Batches, Shape

GROUPED, MULTI_HEAD, MULTI_QUERY = Shape(), Shape(num_keys=4), Shape(num_keys=1)


@pytest.fixture(params=[1.0, 60.0, 1e9], ids=["many banks", "some banks", "one bank"])
def cost(request, monkeypatch):
    """What a bank costs, in columns."""
    monkeypatch.setattr(batch_states, "bank_cost", lambda *_: request.param)


def walk(batches: Batches, draw: random.Random, steps: int, *, with_hook: bool = False) -> set[int]:
    """Let rows come, grow and go at random; return the numbers of banks that occurred."""
    prefixes = [None, None]
    prefixes += [
        PrefixStates(batches.layers(length), strength)
        for length, strength in ((1, 1.0), (5, 0.3), (9, 2.5), (5, 1.0))
    ]
    prompts = [None, SharedPrompt()]
    prompts += [SharedPrompt((1,) * length, batches.layers(length)) for length in (3, 20)]
    hook = list(batches.layers(4)) if with_hook else None
    num_banks = set()
    for _ in range(steps):
        action = draw.random()
        # Now and then memory is short: rows are laid out by what they may come to need, and back again.
        needed = sum(row.max_columns for row in batches.states._rows)
        batches.states.limit = draw.choice((None, None, needed, needed + 100, 2 * needed))
        if not batches.plain or action < 0.15:
            lengths = [draw.choice((1, 2, 7, 30, 31, 90, 200)) for _ in range(draw.randint(1, 5))]
            batches.add(
                [
                    batches.new_row(
                        length,
                        max_length=draw.choice((0, 20, 300)),
                        prefix=draw.choice(prefixes),
                        shared=draw.choice(prompts),
                    )
                    for length in lengths
                ]
            )
        elif action < 0.28:
            numbers = draw.sample(sorted(batches.plain), draw.randint(1, len(batches.plain)))
            batches.remove(numbers)
        elif action < 0.5:
            before = sorted(batches.states.order)
            batches.states.tighten(keep_room=draw.random() < 0.5)
            assert sorted(batches.states.order) == before
        else:
            size = draw.choice((1, 1, 1, 2, 3, 4))
            counts = None if draw.random() < 0.3 else [draw.randint(0, size) for _ in batches.plain]
            batches.step(size, counts, hook)
            num_banks.add(len(batches.states._banks))
    batches.check_held()
    return num_banks


@pytest.mark.usefixtures("cost")
@pytest.mark.parametrize("kv", ["plain", "int8"])
@pytest.mark.parametrize("shape", [GROUPED, MULTI_HEAD, MULTI_QUERY], ids=["grouped", "heads", "query"])
def test_random_walks(shape, kv):
    for seed in range(2):
        assert walk(Batches(shape, kv, seed), random.Random(seed), 40)


@pytest.mark.parametrize("kv", ["plain", "int8"])
def test_random_walks_with_a_prefix_attached_to_the_model(kv):
    for seed in range(2):
        assert walk(Batches(GROUPED, kv, seed), random.Random(seed), 40, with_hook=True)


def test_walks_meet_several_banks(monkeypatch):
    monkeypatch.setattr(batch_states, "bank_cost", lambda *_: 20.0)
    assert len(walk(Batches(GROUPED, "plain", 5), random.Random(5), 80)) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The fused attention and the written-out one take the same additive mask."""
    batches = Batches(GROUPED, "plain", 0)
    prefix = PrefixStates(batches.layers(3), 0.5)
    rows = [batches.new_row(5, prefix=prefix), batches.new_row(70)]
    expected = attend_once(batches, rows, torch.float32, None)
    torch.testing.assert_close(
        attend_once(batches, rows, dtype, None).float(), expected, atol=0.03, rtol=0.05
    )
    shared = SharedPrompt((1, 2), batches.layers(2))
    rows = [batches.new_row(5, prefix=prefix, shared=shared), batches.new_row(70)]
    expected = attend_once(batches, rows, torch.float32, None)
    torch.testing.assert_close(
        attend_once(batches, rows, dtype, None).float(), expected, atol=0.03, rtol=0.05
    )


def test_double_precision():
    """PyTorch's fused attention reads a float32 mask wrongly beside a float64 query."""
    batches = Batches(GROUPED, "plain", 0)
    for shared in (None, SharedPrompt((1, 2), batches.layers(2))):
        rows = [batches.new_row(length, shared=shared) for length in (5, 17, 40, 70)]
        expected = attend_once(batches, rows, torch.float32, None)
        torch.testing.assert_close(
            attend_once(batches, rows, torch.float64, None), expected.double(), atol=2e-5, rtol=1e-4
        )


def attend_once(batches, rows, dtype, hook):
    states = batch_states.BatchStates()
    states.add([replace(row, layers=[(k.to(dtype), v.to(dtype)) for k, v in row.layers]) for row in rows])
    source = torch.Generator().manual_seed(1)
    query, keys, values = (
        torch.randn(len(rows), heads, 2, 8, generator=source).to(dtype) for heads in (4, 2, 2)
    )
    mask = states.open_columns(2)
    assert mask.dtype == dtype
    mixed = states.attend(0, query, (keys, values), mask=mask, prefix=hook, scaling=0.3)
    assert mixed.dtype == dtype
    return mixed


def test_rows_of_unlike_length_are_kept_apart_and_alike_together():
    batches = Batches(Shape(num_keys=2, width=128, num_heads=2), "plain", 0)
    long = batches.add([batches.new_row(900), *[batches.new_row(150 + place) for place in range(7)]])[0]
    banks = batches.states._banks
    assert [len(bank.rows) for bank in banks] == [1, 7]
    assert batches.states.order[0] == long
    more = batches.add([batches.new_row(149)])
    assert [len(bank.rows) for bank in banks] == [1, 8]
    assert batches.states.order[-1] == more[0]


def test_places_are_the_slices_of_the_banks():
    batches = Batches(GROUPED, "plain", 0)
    batches.add([batches.new_row(length) for length in (3, 50, 4, 51)])
    assert batches.states.order == [row.row_id for bank in batches.states._banks for row in bank.rows]


def test_a_row_that_outgrows_its_bank_moves(monkeypatch):
    monkeypatch.setattr(batch_states, "bank_cost", lambda *_: 20.0)
    batches = Batches(GROUPED, "plain", 0)
    first, *others = batches.add([batches.new_row(8) for _ in range(4)])
    assert len(batches.states._banks) == 1
    for _ in range(60):
        order = batches.states.order
        batches.step(1, [int(number == first) for number in order])
        batches.states.tighten(keep_room=True)
    assert [[row.row_id for row in bank.rows] for bank in batches.states._banks] != [[first, *others]]
    assert len(batches.states._banks) == 2
    batches.step()
    batches.check_held()


def test_a_repeated_step_writes_over_the_same_columns():
    batches = Batches(GROUPED, "plain", 0)
    numbers = batches.add([batches.new_row(4), batches.new_row(6)])
    for size in (3, 1, 2):
        mask = batches.states.open_columns(size)
        tokens = [batches.random(2, heads, size) for heads in (4, 2, 2)]
        batches.states.attend(0, tokens[0], (tokens[1], tokens[2]), mask=mask, prefix=None, scaling=1)
    assert [batches.states.length(number) for number in numbers] == [4, 6]
    batches.step(2, [1, 2])
    batches.step()
    assert sum(batches.states.length(number) for number in numbers) == 4 + 6 + 3 + 2
    batches.check_held()


def test_numbers_stay_and_are_not_given_again():
    batches = Batches(GROUPED, "plain", 0)
    first = batches.add([batches.new_row(4) for _ in range(3)])
    batches.remove(first[:2])
    second = batches.add([batches.new_row(4)])
    assert set(first) & set(second) == set()
    assert sorted(batches.states.order) == sorted([first[2], *second])
    with pytest.raises(KeyError, match=f"no row {first[0]} "):
        batches.states.length(first[0])


def test_nothing_is_added_to_an_empty_batch():
    batches = Batches(GROUPED, "plain", 0)
    assert batches.states.add([]) == []
    batches.states.tighten(keep_room=False)
    assert batches.states.order == []
    assert batches.states.held_tokens == batches.states.held_bytes == 0


def test_memory_is_reused_and_then_given_back():
    batches = Batches(GROUPED, "plain", 0)
    numbers = batches.add([batches.new_row(100, max_length=200) for _ in range(16)])
    full = batches.states.held_tokens
    assert full >= 16 * 101
    assert batches.states.held_bytes == full * 2 * 2 * 2 * 8 * 4
    batches.remove(numbers[:12])
    batches.states.tighten(keep_room=True)
    assert batches.states.held_tokens == full
    numbers = numbers[12:] + batches.add([batches.new_row(100) for _ in range(12)])
    assert batches.states.held_tokens == full
    batches.remove(numbers[2:14])
    batches.states.tighten(keep_room=False)
    small = batches.states.held_tokens
    assert small < 0.75 * full
    batches.step()
    batches.states.tighten(keep_room=False)
    assert batches.states.held_tokens == small  # not given back and taken anew step by step
    batches.check_held()


def test_no_room_is_made_beyond_what_a_row_may_hold():
    batches = Batches(GROUPED, "plain", 0)
    batches.add([batches.new_row(10, max_length=15)])
    for _ in range(5):
        batches.step()
    assert batches.states.held_tokens == 15
    batches.step()
    assert batches.states.held_tokens > 15


class Failing:
    """Lets the nth growth of states fail."""

    def __init__(self, monkeypatch):
        self.count, self.failing, real = 0, None, kv_cache._larger

        def larger(*arguments):
            self.count += 1
            if self.count == self.failing:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(*arguments)

        monkeypatch.setattr(kv_cache, "_larger", larger)

    def within(self, number):
        self.count, self.failing = 0, number


@pytest.mark.usefixtures("cost")
@pytest.mark.parametrize("kv", ["plain", "int8"])
def test_a_lack_of_memory_leaves_everything_as_it_was(monkeypatch, kv):
    failing = Failing(monkeypatch)
    failures = 0
    for seed in range(12):
        draw = random.Random(seed)
        batches = Batches(GROUPED, kv, seed)
        failing.within(None)
        batches.add([batches.new_row(draw.choice((2, 60, 200))) for _ in range(5)])
        for _ in range(3):
            batches.step(2, [draw.randint(0, 2) for _ in batches.plain])
        if draw.random() < 0.5:
            batches.remove(draw.sample(sorted(batches.plain), 2))
        new = [batches.new_row(draw.choice((3, 61, 400))) for _ in range(draw.randint(1, 6))]
        order = batches.states.order
        action = [
            lambda batches=batches, new=new: batches.states.add(new),
            lambda batches=batches: batches.states.open_columns(100),
            lambda batches=batches: batches.states.tighten(keep_room=False),
        ][seed % 3]
        failing.within(draw.randint(1, 4))
        try:
            action()
        except torch.OutOfMemoryError:
            failures += 1
            assert batches.states.order == order
            failing.within(None)
            batches.check_held()
            batches.step()
            batches.add(new)
        else:
            failing.within(None)
            continue
        batches.states.tighten(keep_room=False)
        batches.step(3)
        batches.check_held()
    assert failures > 1


@pytest.mark.parametrize("cost_of_bank", [1.0, 30.0])
def test_a_lack_of_memory_while_rows_change_banks(monkeypatch, cost_of_bank):
    monkeypatch.setattr(batch_states, "bank_cost", lambda *_: 1e9)
    failing = Failing(monkeypatch)
    batches = Batches(GROUPED, "plain", 0)
    batches.add([batches.new_row(length) for length in (4, 300, 5, 80, 6)])
    batches.states._bank_cost = cost_of_bank
    for number in (1, 2, 3):
        batches.states._steps_to_plan = 0
        order = batches.states.order
        failing.within(number)
        with pytest.raises(torch.OutOfMemoryError):
            batches.states.tighten(keep_room=True)
        failing.within(None)
        assert batches.states.order == order
        batches.step()
    batches.states._steps_to_plan = 0
    batches.states.tighten(keep_room=True)
    assert len(batches.states._banks) > 1
    batches.step()
    batches.check_held()


@pytest.mark.parametrize("kv", ["plain", "int8"])
def test_a_blanked_row_leaves_nothing_to_the_next_in_its_place(kv):
    """NaN in columns that a row does not see would still spread: its weight is 0, and 0 times NaN is NaN."""
    batches = Batches(GROUPED, kv, seed=1)
    first, second = batches.add([batches.new_row(30, max_length=90), batches.new_row(28, max_length=90)])
    bank = batches.states._banks[0]
    slot = [row.row_id for row in bank.rows].index(second)
    for tensor in bank.tensors:
        if tensor.is_floating_point():
            tensor[slot] = torch.nan
    batches.states.blank(second)
    assert all(not tensor[slot].any() for tensor in bank.tensors)
    assert all(tensor[1 - slot].any() for tensor in bank.tensors)
    batches.remove([second])
    batches.add([batches.new_row(3, max_length=90)])
    batches.step(1, None, None)
    batches.check_held()
    assert first in batches.states.order
