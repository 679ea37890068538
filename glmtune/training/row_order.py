"""The order of training rows: decided by the seed and the epoch alone, so that a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

# Rows are sorted in pools of so many batches, not all at once: enough for little padding, and few enough that
# what a batch holds still differs from epoch to epoch.
BATCHES_SORTED_TOGETHER = 50
_AT_ONCE = 1 << 14  # row numbers that are Python objects at one time


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
        order = np.arange(len(self.lengths))
        if self.shuffle:
            order = order[_permutation(len(order), generator)]
        if self.group_by_length:
            order = self._grouped(order, generator)
        return (
            row
            for start in range(0, len(order), _AT_ONCE)
            for row in order[start : start + _AT_ONCE].tolist()
        )

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

    def _grouped(self, order: np.ndarray, generator: torch.Generator) -> np.ndarray:
        lengths, size = np.asarray(self.lengths), self.batch_size
        pool_size = size * BATCHES_SORTED_TOGETHER
        # Row r of `batches` is a batch. The loader cuts every `batch_size` rows, so the one short batch has
        # to stay at the end.
        pools: list[np.ndarray] = []
        short = order[:0]
        for start in range(0, len(order), pool_size):
            pool = order[start : start + pool_size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            full = len(pool) // size * size
            cut, short = pool[:full].reshape(-1, size), pool[full:]
            pools.append(cut if self.shuffle else cut[_permutation(len(cut), generator)])
        batches = np.concatenate(pools) if pools else order[:0].reshape(0, size)
        if self.shuffle and len(batches):
            batches = batches[_permutation(len(batches), generator)]
            # So that a run whose longest batch does not fit into memory fails now and not after an hour.
            longest = int(lengths[batches].sum(axis=1).argmax())
            batches[[0, longest]] = batches[[longest, 0]]
        return np.concatenate([batches.reshape(-1), short])


def _permutation(count: int, generator: torch.Generator) -> np.ndarray:
    return torch.randperm(count, generator=generator).numpy()


class LengthOrder(Sampler[int]):
    """Row numbers from the longest to the shortest, for evaluation with little padding."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """Sort once.

        Args:
            lengths: tokens of every row.
        """
        self.order: list[int] = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)
