"""Rows as training batches them: samples or packs of samples, their lengths, what makes a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from glmtune.data.collate import PackedDataset
from glmtune.data.dataset import EncodedSplit
from glmtune.data.settings import DataSettings

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from torch.utils.data import Dataset


@dataclass(frozen=True)
class RowSet:
    """Rows that are batched.

    Attributes:
        rows: encoded, indexable by number.
        lengths: tokens of every row.
        packs: where rows are packs, the numbers of the samples in each; None where rows are samples.
    """

    rows: Dataset[Any] | datasets.Dataset
    lengths: Sequence[int]
    packs: Sequence[Sequence[int]] | None = None

    def samples(self, rows: Sequence[int]) -> list[int]:
        """Return the numbers that rows have in the data, where users look for them."""
        if self.packs is None:
            return list(rows)
        return [sample for row in rows for sample in self.packs[row]]


class Collator(Protocol):
    """Makes a batch of rows."""

    @property
    def pad_token_id(self) -> int:
        """Written to ``input_ids`` where there is no token."""
        ...

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``labels``, int64 ``[B, S]``, and a mask or positions of that shape."""
        ...


@dataclass(frozen=True)
class TrainingRows:
    """All rows of a run.

    Attributes:
        train: rows to learn.
        validation: rows for evaluation, if any.
        collator: of both.
    """

    train: RowSet
    validation: RowSet | None
    collator: Collator


def row_set(split: EncodedSplit, settings: DataSettings, *, seed: int) -> RowSet:
    """Return the rows of a split: its samples, or packs of them.

    Args:
        split: encoded.
        settings: ``packing`` and ``packing_length`` are read.
        seed: of the run; decides which samples share a pack.

    Raises:
        ConfigError: a sample is longer than a pack.
    """
    if not settings.packing:
        return RowSet(split.rows, cast(Any, split.lengths))
    packed = PackedDataset(
        cast(Any, split.rows), cast(Any, split.lengths), settings.packing_length, seed=seed
    )
    return RowSet(packed, packed.lengths, packed.packs)
