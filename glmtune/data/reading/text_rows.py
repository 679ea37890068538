"""Rows of text files: JSON and tables of cells, read row by row where they are large.

JSON Lines and tables in UTF-8 above `STREAMED_BYTES` are gone through twice: first for their encoding, as a
byte at the very end may say that all of a file is another one's, then for their rows. Smaller files, JSON
arrays and GB18030 are held as text, but for their rows, which pass one by one as well.
"""

from __future__ import annotations

import codecs
import csv
import io
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from glmtune.data.reading.archives import archive_of, data_suffix, open_packed, read_packed
from glmtune.data.reading.decoding import decode_text
from glmtune.data.reading.json_rows import is_row, iterate_json_rows, line_rows
from glmtune.data.reading.json_values import clipped
from glmtune.data.reading.row_stream import RowStream
from glmtune.data.records import BadRow, RawRow
from glmtune.errors import DataError

logger = logging.getLogger(__name__)

STREAMED_BYTES = 8 << 20
"""Smaller files are read as a whole, which is as fast and holds little."""
PACKED_TIMES = 8
"""How many times as long a packed text may be taken to be."""
FEW_ROWS = 10_000
"""So many are looked for at a file's beginning, without a look at its end."""
_TABLES = (".csv", ".tsv")
_LONGEST_CELL = 1 << 27  # characters; the csv module stops at 131072 on its own
_PREFIX_BYTES = 1 << 20
"""Read of a text file first where only its first rows are wanted, then four times as much, and so on."""


def open_text(path: Path, limit: int | None, columns: Collection[str] | None) -> RowStream:
    """Open a text file: to be read row by row, as a whole or, where few rows are wanted, its beginning.

    Args:
        path: a file, perhaps packed, or a member of an archive.
        limit: rows wanted, at most; more may come.
        columns: of a table, keep only these; None keeps all.

    Raises:
        DataError: it is empty, or in no encoding that is read; what is wrong with a row shows as it is read.
        OSError: it cannot be read.
    """
    archive = archive_of(path)
    is_packed = archive is not None or path.suffix.lower() == ".gz"
    size = (archive or path).stat().st_size
    if size >= STREAMED_BYTES // (PACKED_TIMES if is_packed else 1) and (limit is None or limit > FEW_ROWS):
        scan = scan_text(path)
        if scan is not None:
            return _streamed(path, scan, columns)
    size = 0 if is_packed else size
    num_bytes = size if limit is None else min(size, _PREFIX_BYTES)
    while num_bytes < size:
        assert limit is not None
        with path.open("rb") as file:
            beginning = _whole_lines(file.read(num_bytes))
        # What is wrong in a beginning may be no more than that it ends: the whole file will tell.
        with suppress(DataError):
            stream = _parsed(beginning, path, columns)
            rows = list(islice(stream, limit))
            if len(rows) == limit:
                _warn_of_encoding(stream)
                stream.rows = iter(rows)
                return stream
        num_bytes *= 4
    stream = _parsed(read_packed(path), path, columns)
    _warn_of_encoding(stream)
    return stream


@dataclass(frozen=True, slots=True)
class TextScan:
    """What a look through a large file found: it can be read row by row.

    Attributes:
        encoding: ``utf-8`` or ``utf-8 with BOM``.
        num_bytes: of its text, unpacked.
    """

    encoding: str
    num_bytes: int


def scan_text(path: Path) -> TextScan | None:
    """Look through a large file: can it be read row by row, as a table or JSON Lines in UTF-8?

    Args:
        path: a file, perhaps packed.

    Returns:
        What was found; None where it must be read as a whole, which also says what is wrong with it.
    """
    decoder, head, num_bytes = codecs.getincrementaldecoder("utf-8")("strict"), b"", 0
    try:
        with open_packed(path) as file:
            while chunk := file.read(_PREFIX_BYTES):
                num_bytes += len(chunk)
                head += chunk if len(head) < _PREFIX_BYTES else b""
                decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return None
    text = head.decode("utf-8", "ignore")
    has_mark = text.startswith("\ufeff")
    text = text.removeprefix("\ufeff").lstrip(" \t\r\n")
    # Only rows of a line each: where an array or an object over lines goes on, its values must tell.
    is_table = bool(text) and data_suffix(path) in _TABLES
    if not is_table and not (text.startswith("{") and is_row(text.partition("\n")[0])):
        return None
    return TextScan("utf-8 with BOM" if has_mark else "utf-8", num_bytes)


def _streamed(path: Path, scan: TextScan, columns: Collection[str] | None) -> RowStream:
    suffix = data_suffix(path)
    is_table = suffix in _TABLES
    stream = RowStream(str(path), suffix[1:] if is_table else "jsonl", scan.encoding)

    def rows() -> Iterator[RawRow]:
        # Tables end lines as the csv module asks for it, JSON Lines by `\n` alone: U+2028 and friends are
        # legal inside JSON strings.
        newline = "" if is_table else "\n"
        try:
            with open_packed(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline=newline) as text:
                stream.fraction = lambda: 1.0 if file.closed else file.tell() / scan.num_bytes
                yield from _table_rows(text, stream, columns) if is_table else line_rows(text, stream.bad)
        except UnicodeDecodeError:
            raise DataError("the file changed while it was read. Start again.", path=path) from None

    stream.rows = rows()
    return stream


def _parsed(raw: bytes, path: Path, columns: Collection[str] | None) -> RowStream:
    decoded = decode_text(raw, str(path))
    suffix = data_suffix(path)
    stream = RowStream(str(path), suffix[1:], decoded.encoding)
    if suffix in _TABLES:
        stream.rows = _table_rows(io.StringIO(decoded.text, newline=""), stream, columns)
    else:
        stream.kind, stream.rows = iterate_json_rows(decoded.text, str(path), stream.bad)
    return stream


def _whole_lines(raw: bytes) -> bytes:
    """Drop the last line, which may be cut; a single line stays, up to its last whole character."""
    end = max(raw.rfind(b"\n"), raw.rfind(b"\r")) + 1
    return raw[:end] if end else raw.decode("utf-8", "ignore").encode()


def _warn_of_encoding(stream: RowStream) -> None:
    if stream.encoding == "gb18030":
        logger.warning("%s is not UTF-8; read as GB18030. Convert it to UTF-8 to silence this.", stream.path)


def _table_rows(lines: Iterable[str], stream: RowStream, columns: Collection[str] | None) -> Iterator[RawRow]:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(lines, delimiter="\t" if stream.kind == "tsv" else ",", strict=True)
    header = next(reader, [])
    check_header(header, stream.path, line=1)
    stream.columns = tuple(name for name in header if name)
    # Spreadsheets write columns without a name and rows without a cell where something once stood.
    width = len(header)
    kept = [(p, name) for p, name in enumerate(header) if name and (columns is None or name in columns)]
    unnamed = [place for place, name in enumerate(header) if not name]
    is_empty = True
    # `line_num` is where the last row ended; a quoted cell may hold line breaks, so the next one starts
    # behind it.
    line = reader.line_num + 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise DataError(
                f"no valid table ({error}) in the row that starts here. A cell that holds commas, quotes or"
                ' line breaks stands in double quotes, with quotes inside it doubled ("").',
                path=stream.path,
                line=line,
            ) from None
        is_blank = not any(cells) and len(cells) != 1
        while len(cells) > width and not cells[-1]:
            del cells[-1]
        is_empty = is_empty and is_blank
        if len(cells) != width and not is_blank:
            problem = f"{len(cells)} cells, but the header has {width}. Quote cells that hold commas."
            stream.bad.append(BadRow(line, problem))
        elif not is_blank:
            if unnamed and any(cells[place] for place in unnamed):
                stream.columns, unnamed = (*stream.columns, ""), []
            yield RawRow({name: cells[place] for place, name in kept}, line)
        line = reader.line_num + 1
    if is_empty:
        raise DataError(
            "the file has a header but no rows. A data file needs at least one row.", path=stream.path
        )


def check_header(header: Sequence[str], path: str | Path, line: int | None) -> None:
    """Refuse a table in which two columns have one name.

    Args:
        header: names of the columns.
        path: the file, for the message.
        line: of the header, where it has one.

    Raises:
        DataError: a name occurs twice.
    """
    twice = sorted(name for name, count in Counter(header).items() if name and count > 1)
    if twice:
        raise DataError(
            f"the column `{clipped(twice[0])}` occurs twice in the header. Rename one.", path=path, line=line
        )
