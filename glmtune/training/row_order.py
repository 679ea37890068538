"""The order of training rows: decided by the seed and the epoch alone, so that a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch.utils.data import Sampler

# Rows are sorted in pools of so many batches, not all at once: enough for little padding, and few enough that
# what a batch holds still differs from epoch to epoch.
BATCHES_SORTED_TOGETHER = 50
Item = TypeVar("Item")


class EpochSampler(Sampler[int]):
    """Row numbers, shuffled or in the file's order, optionally with rows of similar length side by side."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        group_by_length: bool,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        """Keep what decides the order.

        Args:
            lengths: tokens of every row.
            batch_size: rows in one forward pass.
            group_by_length: sort within pools of 50 batches, then shuffle the batches; the longest goes
                first, so that a batch too large for the memory fails at once.
            seed: with the epoch, decides the order.
            shuffle: draw rows at random; without it rows keep their order, and grouping by length moves them
                within their pool only.
        """
        self.shuffle = shuffle
        self.lengths = lengths
        self.batch_size = batch_size
        self.group_by_length = group_by_length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # A generator of its own: the global one also draws dropout, and a the order must be known
        # without repeating those draws. The factor keeps (seed 1, epoch 1) and (seed 2, epoch 0) apart.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = list(range(len(self.lengths)))
        if self.shuffle:
            order = _permuted(order, generator)
        return iter(self._grouped(order, generator) if self.group_by_length else order)

    def rows_of_step(self, step: int, *, rows_per_step: int) -> list[int]:
        """Return the row numbers of an optimizer step of the chosen epoch, in all processes.

        Args:
            step: counted from 0 over all epochs.
            rows_per_step: rows of one optimizer step; the last one of an epoch may have fewer.
        """
        order = list(self)
        steps_per_epoch = max(1, -(-len(order) // rows_per_step))
        start = step % steps_per_epoch * rows_per_step
        return order[start : start + rows_per_step]

    def _grouped(self, order: list[int], generator: torch.Generator) -> list[int]:
        pool_size = self.batch_size * BATCHES_SORTED_TOGETHER
        batches: list[list[int]] = []
        short: list[list[int]] = []
        for start in range(0, len(order), pool_size):
            pool = sorted(order[start : start + pool_size], key=lambda row: self.lengths[row])
            cut = [pool[at : at + self.batch_size] for at in range(0, len(pool), self.batch_size)]
            short = [cut.pop()] if len(cut[-1]) < self.batch_size else []
            batches += cut if self.shuffle else _permuted(cut, generator)
        if self.shuffle and batches:
            batches = _permuted(batches, generator)
            # So that a run whose longest batch does not fit into memory fails now and not after an hour.
            longest = max(range(len(batches)), key=lambda at: sum(self.lengths[row] for row in batches[at]))
            batches[0], batches[longest] = batches[longest], batches[0]
        # The loader cuts every `batch_size` rows, so the one short batch has to stay at the end.
        return [row for batch in batches + short for row in batch]


def _permuted(items: list[Item], generator: torch.Generator) -> list[Item]:
    return [items[at] for at in torch.randperm(len(items), generator=generator).tolist()]


class LengthOrder(Sampler[int]):
    """Row numbers from the longest to the shortest, for evaluation with little padding."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """Sort once.

        Args:
            lengths: tokens of every row.
        """
        self.order = sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)
