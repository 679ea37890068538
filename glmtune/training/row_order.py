"""The order of training rows: decided by the seed and the epoch alone, so that a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256

import numpy as np
import torch
from torch.utils.data import Sampler

from glmtune.data.encoded.mixture import MixPart, rows_per_epoch

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
        parts: Sequence[MixPart] = (),
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
            parts: the sets of a mixture, see `rows_of_epoch`; empty where rows are of one set.

        Raises:
            ConfigError: no row would be of one of the sets.
        """
        self.parts, self.rows_per_epoch = parts, rows_per_epoch(parts)
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
        order = self._rows_of_epoch()
        if self.shuffle:
            order = order[_permutation(len(order), generator)]
        if self.group_by_length:
            order = self._grouped(order, generator)
        return (
            row
            for start in range(0, len(order), _AT_ONCE)
            for row in order[start : start + _AT_ONCE].tolist()
        )

    def _rows_of_epoch(self) -> np.ndarray:
        """Return the rows of the chosen epoch before they are shuffled.

        Each set of a mixture is gone through again and again, in a new order every time, and an epoch takes
        up where the one before has ended: with 6 rows of which an epoch takes 4::

            order of the set   2 4 0 5 1 3 | 3 0 1 5 2 4 | ...
            epoch              0 0 0 0 1 1   1 1 2 2 2 2
        """
        if not any(part.weight for part in self.parts):
            return np.arange(len(self.lengths))
        found: list[np.ndarray] = []
        first = 0
        for number, (part, count) in enumerate(zip(self.parts, self.rows_per_epoch, strict=True)):
            start, size = self.epoch * count, part.num_rows
            passes = range(start // size, (start + count - 1) // size + 1)
            orders = [_permutation(size, _generator(self.seed, number, each)) for each in passes]
            skipped = start - passes[0] * size
            found.append(first + np.concatenate(orders)[skipped : skipped + count])
            first += size
        return np.concatenate(found)

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


def _generator(seed: int, part: int, number: int) -> torch.Generator:
    """Return what decides the order of a set's pass; hashed, as sums of seeds would meet each other."""
    digest = sha256(f"{seed} {part} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _permutation(count: int, generator: torch.Generator) -> np.ndarray:
    return torch.randperm(count, generator=generator).numpy()


class LengthOrder(Sampler[int]):
    """Row numbers from the longest to the shortest, for evaluation with little padding."""

    def __init__(self, lengths: Sequence[int], rows: range | None = None) -> None:
        """Sort once.

        Args:
            lengths: tokens of every row.
            rows: those that are wanted; None: all.
        """
        rows = range(len(lengths)) if rows is None else rows
        sizes = np.asarray(lengths, dtype=np.int64)[rows.start : rows.stop]
        self.order: list[int] = (rows.start + np.argsort(-sizes, kind="stable")).tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)
