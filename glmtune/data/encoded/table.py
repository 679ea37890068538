"""Encoded rows as an Arrow table: in memory, or written to a file that is mapped into memory when read."""

from __future__ import annotations

import hashlib
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glmtune.data.encoded.batches import EncodedBatch
from glmtune.data.truncation import TruncationCounts

if TYPE_CHECKING:
    import datasets
    import pyarrow

ROWS_PER_TABLE = 10_000
"""Of up to some thousand tokens: far from 2**31, the limit of 32-bit offsets, and little to hold."""


class RowTable:
    """Takes encoded batches and holds them as flat 32-bit arrays: a fifth of the memory of Python lists.

    Arrow takes such arrays without a copy, so a split is never held as lists, and forked or spawned loader
    processes share it. With a file the rows go there, and only their lengths stay.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Begin with no rows.

        Args:
            file: where they go; None: they stay in memory.
        """
        self._file = file
        self._writer: pyarrow.RecordBatchStreamWriter | None = None
        self._sink: pyarrow.OSFile | None = None
        self._waiting: list[EncodedBatch] = []
        self._tables: list[pyarrow.Table] = []
        self._lengths: list[np.ndarray] = []
        self._num_loss_tokens: list[np.ndarray] = []
        self._desirable: list[np.ndarray] = []
        self._truncation = np.zeros(len(TruncationCounts.__dataclass_fields__), dtype=np.int64)
        self._digest = hashlib.sha256()

    def add(self, batch: EncodedBatch) -> None:
        """Take further rows.

        Raises:
            OSError: the file cannot be written.
        """
        self._lengths.append(batch.lengths)
        self._num_loss_tokens.append(batch.num_loss_tokens)
        self._desirable.append(batch.desirable)
        self._truncation += np.array(astuple(batch.truncation), dtype=np.int64)
        self._waiting.append(batch)
        if sum(len(each.lengths) for each in self._waiting) >= ROWS_PER_TABLE:
            self._flush()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of all rows, int32 ``[rows]``."""
        return np.concatenate([np.zeros(0, np.int32), *self._lengths])

    @property
    def num_loss_tokens(self) -> np.ndarray:
        """Tokens of all rows that carry loss, int32 ``[rows]``."""
        return np.concatenate([np.zeros(0, np.int32), *self._num_loss_tokens])

    @property
    def desirable(self) -> np.ndarray:
        """Whether the answers of all rows are such to give more often, bool ``[rows]``."""
        return np.concatenate([np.zeros(0, np.bool_), *self._desirable])

    @property
    def truncation(self) -> TruncationCounts:
        """What was cut of all rows."""
        return TruncationCounts(*map(int, self._truncation))

    def _flush(self) -> None:
        import pyarrow as pa

        lengths = np.concatenate([batch.lengths for batch in self._waiting])
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        tokens = {
            name: np.concatenate([getattr(batch, name) for batch in self._waiting])
            for name in ("input_ids", "labels")
        }
        columns = {
            name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in tokens.items()
        }
        self._waiting = []
        table = pa.table({**columns, "length": pa.array(lengths)})
        if self._file is not None:
            if self._writer is None:
                # Opened here: a writer that opens a file itself leaves it open, and Windows renames no such.
                self._sink = pa.OSFile(str(self._file), "wb")
                self._writer = pa.ipc.new_stream(self._sink, table.schema)
            self._writer.write_table(table)
            return
        for values in (lengths, *tokens.values()):
            self._digest.update(values.data)
        self._tables.append(table)

    def close(self) -> None:
        """Write what waits, and the file's end.

        Raises:
            OSError: the file cannot be written.
        """
        if self._waiting or (self._file is not None and self._writer is None):
            self._waiting = self._waiting or [_NOTHING]
            self._flush()
        if self._writer is not None:
            self._writer.close()
        if self._sink is not None:
            self._sink.close()

    def dataset(self) -> datasets.Dataset:
        """Return the rows that stayed in memory."""
        import datasets
        import pyarrow as pa

        self.close()
        # The digest names them for `datasets`, which would hash everything again.
        return datasets.Dataset(pa.concat_tables(self._tables), fingerprint=self._digest.hexdigest()[:16])


_NOTHING = EncodedBatch(
    *(np.zeros(0, np.int32) for _ in range(4)),
    desirable=np.zeros(0, np.bool_),
    truncation=TruncationCounts(),
    problems=(),
)


def read_table(file: Path, fingerprint: str) -> datasets.Dataset:
    """Map the rows of a file into memory.

    Args:
        file: that `RowTable` wrote.
        fingerprint: names the rows for `datasets`.

    Raises:
        OSError: it is not there, or cut.
        ValueError: it holds something else.
    """
    import datasets
    import pyarrow as pa
    from datasets.table import MemoryMappedTable

    with pa.memory_map(str(file)) as mapped:
        schema = pa.ipc.open_stream(mapped).schema
    tokens = pa.list_(pa.int32())
    # Compared before anything is made of it: a schema of others could ask for types that run code.
    if schema.metadata or schema != pa.schema({"input_ids": tokens, "labels": tokens, "length": pa.int32()}):
        raise ValueError("its columns are not those of encoded rows")
    return datasets.Dataset(MemoryMappedTable.from_file(str(file)), fingerprint=fingerprint)
