"""Rows as training batches them: samples or packs of samples, their lengths, what makes a batch of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from glmtune.data.collate import PackedDataset
from glmtune.data.dataset import EncodedSplit
from glmtune.data.encoded.mixture import MixPart
from glmtune.data.settings import DataSettings
from glmtune.data.streaming.rows import StreamedRows, StreamedSplit, place_from

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
        stream: where rows are read as they are learnt, what reads them.
        parts: the sets of a mixture, whose rows lie one behind the other; empty where the rows are of one.
    """

    rows: Dataset[Any] | datasets.Dataset
    lengths: Sequence[int]
    packs: Sequence[Sequence[int]] | None = None
    parts: tuple[MixPart, ...] = ()
    stream: StreamedRows | None = None

    def place(self, index: int) -> dict[str, Any]:
        """Return what a checkpoint keeps of the place of a row; empty unless rows are streamed."""
        return {} if self.stream is None else {"stream": self.stream.place_of(index)}

    def seek(self, index: int, kept: Mapping[str, Any]) -> None:
        """Go on from the place of a row as `place` told it; needless unless rows are streamed."""
        if self.stream is not None:
            self.stream.seek(index, place_from(kept["stream"]))

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


def row_set(split: EncodedSplit | StreamedSplit, settings: DataSettings, *, seed: int) -> RowSet:
    """Return the rows of a split: its samples, or packs of them.

    Args:
        split: encoded.
        settings: ``packing`` and ``packing_length`` are read.
        seed: of the run; decides which samples share a pack.

    Raises:
        ConfigError: a sample is longer than a pack.
    """
    if isinstance(split, StreamedSplit):
        return RowSet(split.stream, split.lengths, stream=split.stream)
    if not settings.packing:
        return RowSet(split.rows, cast(Any, split.lengths), parts=split.parts)
    packed = PackedDataset(
        cast(Any, split.rows),
        cast(Any, split.lengths),
        settings.packing_length,
        seed=seed,
        parts=[part.num_rows for part in split.parts],
    )
    counts = zip(split.parts, packed.rows_of_parts, strict=False)
    parts = tuple(replace(part, num_rows=count) for part, count in counts)
    return RowSet(packed, packed.lengths, packed.packs, parts)
