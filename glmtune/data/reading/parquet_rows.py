"""Rows of Parquet files, unpacked within bounds as they are asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from glmtune.data.reading.archives import MIN_BYTES_READ, MOST_UNPACKED_TIMES
from glmtune.data.reading.row_stream import RowStream
from glmtune.data.reading.text_rows import check_header
from glmtune.data.records import RawRow
from glmtune.errors import DataError

_BUFFER_BYTES = 1 << 20
# A Parquet file of a few kilobytes may stand for any number of equal rows and texts.
_BATCH_ROWS = 256
_MIN_ROWS_READ, _MIN_BYTES_READ = 1_000_000, MIN_BYTES_READ


def open_parquet(path: Path, limit: int | None, columns: Collection[str] | None) -> RowStream:
    """Open a Parquet file; what is wrong with it shows as it is read.

    Args:
        path: the file.
        limit: rows read, at most.
        columns: keep only these; None keeps all.
    """
    stream = RowStream(str(path), "parquet")
    stream.rows = _rows(path, stream, limit, columns)
    return stream


def _rows(
    path: Path, stream: RowStream, limit: int | None, columns: Collection[str] | None
) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # Pages stream through the buffer: otherwise a whole group of rows is read, perhaps all there are.
        table = pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES)
        names = tuple(str(name) for name in table.schema_arrow.names)
        check_header(names, path, line=None)
        stream.columns, total = names, max(1, table.metadata.num_rows)
        stream.fraction = lambda: min(1.0, number / total)
        kept = [name for name in names if columns is None or name in columns]
        unpacked = _unpacked(table, kept, path, min(_BATCH_ROWS, limit or _BATCH_ROWS))
        for values in islice(unpacked, limit):
            number += 1
            yield RawRow(values, number)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # The last two come from values that Python has no form for: bytes that are no text, the year 300000.
        raise DataError(
            f"no valid Parquet file: {first_line(error)} Copy or download it again.",
            path=path,
            line=number + 1 if number else None,
        ) from None
    if not number:
        raise DataError("the file holds no rows. A data file needs at least one row.", path=path)


def _unpacked(table: Any, columns: list[str], path: Path, batch_size: int) -> Iterator[dict[str, object]]:
    """Yield rows as they are unpacked, within bounds that follow from the file's size."""
    size = path.stat().st_size
    most_rows, most_bytes = max(_MIN_ROWS_READ, size), max(_MIN_BYTES_READ, MOST_UNPACKED_TIMES * size)
    num_rows = num_bytes = 0
    for batch in table.iter_batches(batch_size=batch_size, columns=columns):
        num_rows += batch.num_rows
        num_bytes += batch.nbytes
        if num_rows > most_rows or num_bytes > most_bytes:
            raise DataError(
                f"the {size} bytes of this file unpack to more than {most_rows} rows or {most_bytes} bytes,"
                " the most that is read of a file of this size. Write its rows as JSON Lines, or fewer.",
                path=path,
            )
        yield from _as_written(batch).to_pylist()


def _as_written(batch: Any) -> Any:
    """Return the rows with short floats as their shortest text says: 0.1, not 0.10000000149011612."""
    import pyarrow as pa

    for place, field in enumerate(batch.schema):
        if field.type in (pa.float32(), pa.float16()):
            column = batch.column(place).cast(pa.float32()).cast(pa.string()).cast(pa.float64())
            batch = batch.set_column(place, field.name, column)
    return batch


def first_line(error: Exception) -> str:
    """Return the first line of what a library says, as a sentence."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if line.endswith((".", "!", "?")) else line + "."
