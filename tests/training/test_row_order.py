"""The order of rows: complete, repeatable, and similar lengths side by side."""

from __future__ import annotations

import random

import pytest

from glmtune.training.row_order import BATCHES_SORTED_TOGETHER, EpochSampler, LengthOrder

GENERATOR = random.Random(1)
LENGTHS = [GENERATOR.randint(5, 200) for _ in range(203)]


def padding(order: list[int], batch_size: int) -> int:
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    return sum(max(LENGTHS[row] for row in batch) - LENGTHS[row] for batch in batches for row in batch)


@pytest.mark.parametrize("group", [True, False])
def test_every_row_once_and_repeatable(group: bool) -> None:
    orders = []
    for epoch in (0, 1, 0):
        sampler = EpochSampler(LENGTHS, batch_size=8, group_by_length=group, seed=5)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert all(sorted(order) == list(range(203)) for order in orders)
    assert orders[0] == orders[2] != orders[1]
    assert list(EpochSampler(LENGTHS, batch_size=8, group_by_length=group, seed=6)) != orders[0]
    assert len(sampler) == 203


def test_grouping_saves_padding_and_starts_with_the_longest() -> None:
    grouped = list(EpochSampler(LENGTHS, batch_size=8, group_by_length=True, seed=5))
    shuffled = list(EpochSampler(LENGTHS, batch_size=8, group_by_length=False, seed=5))
    assert padding(grouped, 8) < padding(shuffled, 8) / 10
    sums = [sum(LENGTHS[row] for row in grouped[at : at + 8]) for at in range(0, 200, 8)]
    assert sums[0] == max(sums)
    assert sums[1:] != sorted(sums[1:], reverse=True)


def test_evaluation_goes_from_long_to_short() -> None:
    order = list(LengthOrder([3, 9, 5]))
    assert order == [1, 2, 0]
    assert len(LengthOrder([3, 9, 5])) == 3


@pytest.mark.parametrize("rows", [0, 1, 8, 9])
def test_small_sets(rows: int) -> None:
    sampler = EpochSampler(LENGTHS[:rows], batch_size=8, group_by_length=True, seed=5)
    assert sorted(sampler) == list(range(rows))


def test_unshuffled_rows_keep_the_order_of_the_file() -> None:
    plain = EpochSampler([3, 1, 2], batch_size=2, group_by_length=False, seed=0, shuffle=False)
    assert list(plain) == [0, 1, 2]


def test_grouping_moves_unshuffled_rows_within_their_pool_only() -> None:
    lengths = [(7 * row) % 41 + 1 for row in range(1003)]
    sampler = EpochSampler(lengths, batch_size=4, group_by_length=True, seed=0, shuffle=False)
    order = list(sampler)
    pool = 4 * BATCHES_SORTED_TOGETHER
    for start in range(0, 1000, pool):
        assert sorted(order[start : start + pool]) == list(range(start, min(start + pool, 1003)))
    batches = [order[at : at + 4] for at in range(0, 1000, 4)]
    assert all(max(lengths[row] for row in b) - min(lengths[row] for row in b) <= 2 for b in batches)
    assert order == list(sampler)
    sampler.set_epoch(1)
    assert order != list(sampler)
