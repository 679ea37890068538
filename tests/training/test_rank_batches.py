"""However many processes share an epoch, every row counts once and all make the same number of batches."""

from __future__ import annotations

import pytest
from torch.utils.data import SequentialSampler

from glmtune.labels import IGNORE_INDEX
from glmtune.training.rank_batches import FilledRows, RankBatches, filler


def shares(rows: int, batch_size: int, processes: int) -> list[list[list[int]]]:
    order = SequentialSampler(range(rows))
    made = [
        RankBatches(order, batch_size=batch_size, rank=rank, num_processes=processes)
        for rank in range(processes)
    ]
    batches = [list(batches) for batches in made]
    assert [len(sampler) for sampler in made] == [len(found) for found in batches]
    return batches


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2, 7, 12, 13])
def test_every_row_once(rows: int, processes: int) -> None:
    batches = shares(rows, 2, processes)
    assert len({len(found) for found in batches}) == 1
    seen = [row for found in batches for batch in found for row in batch if row >= 0]
    assert sorted(seen) == list(range(rows))
    assert all(batch for found in batches for batch in found)


def test_together_they_see_what_one_process_sees() -> None:
    one, two = shares(7, 4, 1)[0], shares(7, 2, 2)
    assert [first + second for first, second in zip(*two, strict=True)] == one


def test_a_filler_teaches_nothing() -> None:
    rows = FilledRows([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}])
    assert shares(1, 2, 2) == [[[0]], [[filler(0)]]]
    assert rows[filler(1)] == {"input_ids": [7], "labels": [IGNORE_INDEX]}
    assert rows[0]["labels"] == [5, 6]
    assert len(rows) == 2
