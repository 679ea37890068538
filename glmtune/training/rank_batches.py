"""Share an epoch's rows among processes so that every row counts exactly once.

    order      0 1 2 3 | 4 5 6 7 | 8        batch_size 2, two processes: 9 rows, three forward passes each
    process 0  0 1     | 4 5     | 8
    process 1      2 3 |     6 7 | -9       a filler: the tokens of row 8 without a label

Samplers of PyTorch and accelerate repeat rows until all processes have the same number; those would count
twice, and training on two processes would not equal training on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments

from glmtune.labels import IGNORE_INDEX


class RankBatches(Sampler[list[int]]):
    """The micro-batches of one process, as row numbers.

    Of every ``batch_size × num_processes`` rows each process takes ``batch_size``, so together they see what
    one process with the larger batch would. The last rows of an epoch are shared evenly. A process left
    without a row gets a filler, a negative number, so that all make the same number of forward passes: a
    process that ended earlier would leave the others waiting for it.
    """

    def __init__(self, order: Sampler[int], *, batch_size: int, rank: int, num_processes: int) -> None:
        """Keep what decides the share.

        Args:
            order: row numbers of an epoch, the same in every process.
            batch_size: rows of one process in one forward pass.
            rank: of this process.
            num_processes: that share the rows.
        """
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.num_processes = num_processes

    def __len__(self) -> int:
        return -(-len(self.order) // (self.batch_size * self.num_processes))  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[list[int]]:
        rows_per_pass = self.batch_size * self.num_processes
        rows: list[int] = []
        for row in self.order:
            rows.append(row)
            if len(rows) == rows_per_pass:
                yield self._share(rows)
                rows = []
        if rows:
            yield self._share(rows)

    def _share(self, rows: list[int]) -> list[int]:
        each, more = divmod(len(rows), self.num_processes)
        start = self.rank * each + min(self.rank, more)
        share = rows[start : start + each + (self.rank < more)]
        return share or [filler(rows[-1])]


def filler(row: int) -> int:
    """Return the number that stands for a row of which nothing is learnt; its own inverse.

    -1 stands for row 0, as there is no other 0.
    """
    return -1 - row


class FilledRows(Dataset[dict[str, Any]]):
    """Rows, and fillers: the tokens of a row with no label."""

    def __init__(self, rows: Any) -> None:
        """Wrap.

        Args:
            rows: indexable by number; each has ``input_ids`` and ``labels``.
        """
        self.rows = rows

    def __len__(self) -> int:
        """Return the number of real rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row; for a negative number the filler made of the row it stands for."""
        if index >= 0:
            return self.rows[index]
        row = dict(self.rows[filler(index)])
        return {**row, "labels": [IGNORE_INDEX] * len(row["labels"])}


def rank_loader(
    rows: Any, order: Sampler[int], collate: Any, *, batch_size: int, args: TrainingArguments
) -> DataLoader[Any]:
    """Return the batches of this process.

    Args:
        rows: indexable by number.
        order: row numbers, the same in every process.
        collate: makes a batch of rows.
        batch_size: rows of one process in one forward pass.
        args: tell which process this is, and how batches are loaded.
    """
    batches = RankBatches(
        order, batch_size=batch_size, rank=args.process_index, num_processes=args.world_size
    )
    return DataLoader(
        FilledRows(rows) if args.world_size > 1 else rows,  # one process has a row in each batch
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.device.type == "cuda",
    )
