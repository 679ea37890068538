"""Make batches of rows: padded to the longest of the batch, or packed without seeing each other.

Shapes: B rows in the batch, S tokens in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

from glmtune.errors import ConfigError
from glmtune.labels import IGNORE_INDEX

TokenRow = Mapping[str, Sequence[int]]


def _padded(rows: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
    batch = torch.full((len(rows), length), fill, dtype=torch.long)
    for number, row in enumerate(rows):
        batch[number, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return batch


def _padded_length(rows: Sequence[Sequence[int]], multiple: int) -> int:
    longest = max(len(row) for row in rows)
    return -(-longest // multiple) * multiple


@dataclass(frozen=True, slots=True)
class DynamicPaddingCollator:
    """Pad a batch on the right to its own longest row.

    Attributes:
        pad_token_id: written to ``input_ids`` where there is no token.
        pad_to_multiple_of: the padded length is rounded up to a multiple of this, in tokens.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """Build the batch.

        Args:
            rows: each with ``input_ids`` and ``labels`` of one length; other columns are left out.

        Returns:
            ``input_ids``, ``labels`` (−100 on padding) and ``attention_mask`` (1 = real), int64 ``[B, S]``.
        """
        tokens = [row["input_ids"] for row in rows]
        length = _padded_length(tokens, self.pad_to_multiple_of)
        return {
            "input_ids": _padded(tokens, length, self.pad_token_id),
            "labels": _padded([row["labels"] for row in rows], length, IGNORE_INDEX),
            "attention_mask": _padded([[1] * len(row) for row in tokens], length, 0),
        }


@dataclass(frozen=True, slots=True)
class PackingCollator:
    """Batch packed rows; position ids that restart at 0 are what keeps samples apart.

    There is no attention mask on purpose: transformers derives the block mask from ``position_ids`` only when
    neither an attention mask nor a cache is passed, so models must run with ``use_cache=False``.

    Attributes:
        pad_token_id: written where there is no token (padding counts as samples of its own, without loss).
        pad_to_multiple_of: the padded length is rounded up to a multiple of this, in tokens.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """Build the batch.

        Args:
            rows: from a `PackedDataset`: ``input_ids``, ``labels`` and ``position_ids`` of one length each.

        Returns:
            ``input_ids``, ``labels`` and ``position_ids``, all int64 ``[B, S]``.
        """
        names = ("input_ids", "labels", "position_ids")
        columns = {name: [list(row[name]) for row in rows] for name in names}
        length = _padded_length(columns["input_ids"], self.pad_to_multiple_of)
        # Padding counts from 0, so it is a sample of its own; carrying on would make it part of the last one.
        for row in columns["position_ids"]:
            row.extend(range(length - len(row)))
        return {
            "input_ids": _padded(columns["input_ids"], length, self.pad_token_id),
            "labels": _padded(columns["labels"], length, IGNORE_INDEX),
            "position_ids": _padded(columns["position_ids"], length, 0),
        }


def pack_lengths(lengths: Sequence[int], packing_length: int, *, seed: int = 0) -> list[list[int]]:
    """Distribute samples over packed rows, first fit by decreasing length.

    Samples of one length are shuffled by the seed, and so are the packed rows and the samples inside them, so
    that neither order nor neighbours follow the length. The same seed gives the same rows.

    Args:
        lengths: tokens of each sample.
        packing_length: most tokens of a packed row.
        seed: of the shuffles.

    Returns:
        For each packed row the indices of its samples; every index occurs exactly once.

    Raises:
        ConfigError: a sample is longer than a packed row.

    >>> sorted(sorted(row) for row in pack_lengths([6, 5, 4, 3], 10))
    [[0, 2], [1, 3]]
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and sizes.max() > packing_length:
        worst = int(sizes.argmax())
        raise ConfigError(
            f"`data.packing_length` is {packing_length}, but sample {worst} has {sizes[worst]} tokens and"
            f" must fit into one packed row. Set data.packing_length to at least {sizes[worst]} or shorten"
            " the samples with data.max_source_length and data.max_target_length."
        )
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(sizes.size)
    # Longest first, which leaves least room unused; shuffled before a stable sort, so that only samples of
    # one length change places.
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    rows = _first_fit(order, sizes, packing_length)
    for row in rows:
        generator.shuffle(row)
    return [rows[index] for index in generator.permutation(len(rows))]


def _first_fit(order: np.ndarray, sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Put each sample into the first row with room for it.

    Samples of one size come one after the other, as the order goes from the longest to the shortest. The
    first row with room takes as many of them as it holds, then the next row does, so all of one size are
    placed at once, in as many steps as there are sizes::

        room     [100][40][70]      five samples of 30
        taken       3   1   1       the last row would hold a second one
        left     [ 10][10][40]

    Args:
        order: sample numbers by decreasing size.
        sizes: of all samples.
        capacity: of a row.

    Returns:
        For each row its samples, in the order in which they were put there.
    """
    room = np.full(len(order), capacity, dtype=np.int64)
    num_rows, row_of = 0, np.empty(len(order), dtype=np.int64)
    sorted_sizes = sizes[order]
    starts = np.flatnonzero(np.diff(sorted_sizes, prepend=-1)).tolist()
    for start, end in pairwise([*starts, len(order)]):
        size, count = int(sorted_sizes[start]), end - start
        if not size:  # nothing takes no room, so the first row holds any number of it
            row_of[start:end], num_rows = 0, max(1, num_rows)
            continue
        places = np.flatnonzero(room[:num_rows] >= size)
        fits = room[places] // size
        before = np.cumsum(fits) - fits
        places, fits = places[before < count], fits[before < count]
        missing = count - int(fits.sum())
        if missing > 0:
            per_row = capacity // size  # new rows stand behind those begun
            new = -(-missing // per_row)
            places = np.concatenate([places, np.arange(num_rows, num_rows + new)])
            fits = np.concatenate([fits, np.full(new, per_row)])
            num_rows += new
        row_of[start:end] = np.repeat(places, fits)[:count]
        taken = np.bincount(row_of[start:end], minlength=num_rows)
        room[:num_rows] -= taken[:num_rows] * size
    # Stable, so that samples of a row stay in the order in which they came into it.
    by_row = order[np.argsort(row_of, kind="stable")].tolist()
    ends = np.cumsum(np.bincount(row_of, minlength=num_rows)).tolist()
    return [by_row[start:end] for start, end in zip([0, *ends], ends, strict=False)]


class PackedDataset(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Rows of several samples each, under ``packing_length`` tokens.

    Positions restart at 0 with every sample, and the first label of a sample is −100, so that nothing is
    predicted across a border.

    Attributes:
        packs: for each packed row the indices of its samples.
        lengths: tokens of each packed row.
        rows_of_parts: packed rows of each part, one behind the other.
    """

    def __init__(
        self,
        rows: Sequence[TokenRow],
        lengths: Sequence[int],
        packing_length: int,
        *,
        seed: int = 0,
        parts: Sequence[int] = (),
    ) -> None:
        """Plan the packed rows; tokens are put together when a row is asked for.

        Args:
            rows: samples with ``input_ids`` and ``labels`` (a list or a `datasets.Dataset`).
            lengths: tokens of each sample.
            packing_length: most tokens of a packed row.
            seed: of the shuffles.
            parts: samples of each part, one behind the other; no row holds samples of two. Empty: one part.

        Raises:
            ConfigError: a sample is longer than a packed row.
        """
        self._rows = rows
        self.packs: list[list[int]] = []
        self.rows_of_parts: list[int] = []
        for start, end in pairwise(np.cumsum([0, *(parts or [len(lengths)])]).tolist()):
            packs = pack_lengths(lengths[start:end], packing_length, seed=seed)
            self.packs += packs if not start else [[start + sample for sample in pack] for pack in packs]
            self.rows_of_parts.append(len(packs))
        sizes, counts = np.asarray(lengths), [len(pack) for pack in self.packs]
        flat = np.fromiter(chain.from_iterable(self.packs), dtype=np.int64, count=sum(counts))
        starts = np.cumsum([0, *counts[:-1]], dtype=np.int64)
        self.lengths: list[int] = np.add.reduceat(sizes[flat], starts).tolist() if counts else []

    def __len__(self) -> int:
        """Return the number of packed rows."""
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return ``input_ids``, ``labels``, ``position_ids`` of one packed row, each ``[S]``."""
        packed: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for sample in self.packs[index]:
            row = self._rows[sample]
            packed["input_ids"] += row["input_ids"]
            # The model predicts each token from the one before it; before a sample's first stands another
            # one.
            packed["labels"] += [IGNORE_INDEX, *row["labels"][1:]]
            packed["position_ids"] += range(len(row["input_ids"]))
        return packed
