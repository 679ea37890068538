"""A mixture's epochs: the shares of its sets, every row of a set before any again, the same when resumed."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from glmtune.data.collate import PackedDataset
from glmtune.data.encoded.mixture import MixPart, rows_per_epoch
from glmtune.errors import ConfigError
from glmtune.training.row_order import EpochSampler, LengthOrder

SIZES = (40, 100, 7)
BORDERS = np.cumsum([0, *SIZES])
LENGTHS = [5 + number % 30 for number in range(sum(SIZES))]


def parts(*weights: float | None) -> list[MixPart]:
    return [MixPart(name, weight, size) for name, weight, size in zip("abc", weights, SIZES, strict=True)]


def sampler(*weights: float | None, **more: Any) -> EpochSampler:
    settings: dict[str, Any] = {"batch_size": 4, "group_by_length": False, "seed": 3, **more}
    return EpochSampler(LENGTHS, parts=parts(*weights), **settings)


def of_sets(rows: list[int]) -> list[list[int]]:
    return [[row for row in rows if low <= row < high] for low, high in pairwise(BORDERS)]


def test_shares_add_up_to_an_epoch() -> None:
    assert rows_per_epoch(parts(None, None, None)) == list(SIZES)
    for weights in ((1, 1, 1), (0.7, 0.2, 0.1), (5, 3, 0.4)):
        counts = rows_per_epoch(parts(*weights))
        assert sum(counts) == sum(SIZES)
        exact = [sum(SIZES) * weight / sum(weights) for weight in weights]
        assert all(abs(count - want) < 1 for count, want in zip(counts, exact, strict=True))
    with pytest.raises(ConfigError, match=r"`weight` of `c`.*0\.001.*147 rows of an epoch none"):
        rows_per_epoch(parts(1, 1, 0.001))


def test_without_weights_the_order_is_that_of_one_set() -> None:
    plain = EpochSampler(LENGTHS, batch_size=4, group_by_length=True, seed=3)
    assert list(sampler(None, None, None, group_by_length=True)) == list(plain)


@pytest.mark.parametrize("grouped", [True, False])
def test_every_row_of_a_set_comes_before_any_again(grouped: bool) -> None:
    order = sampler(3, 1, 1, group_by_length=grouped)
    counts = order.rows_per_epoch
    seen: list[Counter[int]] = [Counter() for _ in SIZES]
    for epoch in range(5):
        order.set_epoch(epoch)
        rows = list(order)
        assert len(rows) == len(order) == sum(SIZES)
        for have, own, count in zip(seen, of_sets(rows), counts, strict=True):
            assert len(own) == count
            have.update(own)
    for have, size, count in zip(seen, SIZES, counts, strict=True):
        passes = {have[row] for row in have} | ({0} if len(have) < size else set())
        assert max(passes) - min(passes) <= 1, f"{count} of {size} a time"


def test_an_epoch_is_the_same_whatever_came_before() -> None:
    run = sampler(3, 1, 1)
    epochs = []
    for epoch in range(3):
        run.set_epoch(epoch)
        epochs.append(list(run))
    resumed = sampler(3, 1, 1)
    resumed.set_epoch(2)
    assert list(resumed) == epochs[2] != epochs[1]
    assert list(sampler(3, 1, 1, seed=4)) != epochs[0]
    resumed.set_epoch(1)
    assert resumed.rows_of_step(0, rows_per_step=12) == epochs[1][:12]


def test_packs_hold_samples_of_one_set() -> None:
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in LENGTHS]
    packed = PackedDataset(rows, LENGTHS, 64, seed=1, parts=SIZES)
    assert sum(packed.rows_of_parts) == len(packed)
    assert sorted(sample for pack in packed.packs for sample in pack) == list(range(sum(SIZES)))
    starts = np.cumsum([0, *packed.rows_of_parts])
    for (start, end), (low, high) in zip(pairwise(starts), pairwise(BORDERS), strict=True):
        assert all(low <= sample < high for pack in packed.packs[start:end] for sample in pack)
    assert packed.lengths == [sum(LENGTHS[sample] for sample in pack) for pack in packed.packs]
    alone = PackedDataset(rows, LENGTHS, 64, seed=1)
    assert alone.packs == PackedDataset(rows, LENGTHS, 64, seed=1, parts=[len(rows)]).packs


def test_evaluation_takes_the_rows_of_a_set_alone() -> None:
    order = list(LengthOrder(LENGTHS, range(40, 140)))
    assert sorted(order) == list(range(40, 140))
    assert [LENGTHS[row] for row in order] == sorted((LENGTHS[row] for row in order), reverse=True)
