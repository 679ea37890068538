"""Rows of one source that pass one by one, so that no more of a large file is held than the row in hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from glmtune.data.records import BadRow, RawRow


class RowStream:
    """The rows of one source, to be gone through once.

    Attributes:
        path: the file or hub id.
        kind: ``json``, ``jsonl``, ``csv``, ``tsv``, ``parquet`` or ``hub``.
        encoding: see `glmtune.data.records.RowTable`.
        columns: likewise; complete when the rows are at their end.
        bad: rows that could not be read, so far.
        rows: those that can, in the order of the file.
        fraction: tells how much of the source is read, from 0 to 1; 0 where that is not known.
    """

    def __init__(self, path: str, kind: str, encoding: str = "") -> None:
        """Describe a source, whose rows are set next.

        Args:
            path: the file or hub id.
            kind: see above.
            encoding: see above.
        """
        self.path, self.kind, self.encoding = path, kind, encoding
        self.columns: tuple[str, ...] = ()
        self.bad: list[BadRow] = []
        self.rows: Iterator[RawRow] = iter(())
        self.fraction: Callable[[], float] = float

    def __iter__(self) -> Iterator[RawRow]:
        """Return the rows that are left."""
        return self.rows
