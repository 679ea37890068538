"""The records that pass between reader, layout and encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from glmtune.errors import DataError
from glmtune.messages import Message

SHOWN_BAD_ROWS = 10


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a data set after its layout was read.

    Attributes:
        messages: optional system message, then user, assistant, (observation, assistant,) user, ... ; or one
            message of the assistant alone: plain text.
        path: the file or hub id it came from.
        line: 1-based line in that file (row number in Parquet files and hub data sets).
        rejected: of a preference pair, what is worse than the answer, to the same prompt.
        desirable: whether the answer is one to give more often; None where nobody judged it alone.
    """

    messages: tuple[Message, ...]
    path: str
    line: int
    rejected: Message | None = None
    desirable: bool | None = None

    @property
    def answer(self) -> Message | None:
        """The last message if the assistant wrote it, else None (a question without reference answer)."""
        last = self.messages[-1]
        return last if last.role == "assistant" else None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All messages before the last answer."""
        return self.messages if self.answer is None else self.messages[:-1]


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as the file holds it.

    Attributes:
        values: column name to value.
        line: 1-based line where the row starts (row number in Parquet files and hub data sets).
    """

    values: Mapping[str, object]
    line: int


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        line: 1-based line or row number.
        problem: the field, what is wrong with it and what to do.
        empty_answer: whether the row lacks nothing but its answer.
        path: the file it is in, where the rows are of several; else empty.
    """

    line: int
    problem: str
    empty_answer: bool = False
    path: str = ""


class RowProblem(Exception):
    """What is wrong with the row in hand; becomes a `BadRow` where the line is known."""

    def __init__(self, problem: str, *, empty_answer: bool = False) -> None:
        """Keep the problem's words.

        Args:
            problem: the field, what is wrong with it and what to do.
            empty_answer: whether the row lacks nothing but its answer.
        """
        super().__init__(problem)
        self.empty_answer = empty_answer


@dataclass(frozen=True, slots=True)
class RowTable:
    """All rows of one source.

    Attributes:
        rows: the readable rows, in file order.
        bad: rows that could not even be read.
        path: the file or hub id.
        kind: ``json``, ``jsonl``, ``csv``, ``tsv``, ``parquet`` or ``hub``.
        encoding: ``utf-8``, ``utf-8 with BOM``, ``gb18030``, or empty for binary sources.
        columns: all columns of a table, those too that rows were read without; empty where rows tell.
    """

    rows: Sequence[RawRow]
    bad: Sequence[BadRow]
    path: str
    kind: str
    encoding: str
    columns: tuple[str, ...] = ()


_SKIP = "Correct the file, or set `data.on_bad_row=skip` to leave such rows out and have them counted."


def bad_rows_error(path: str, bad: Sequence[BadRow], total: int, *, way_out: str = _SKIP) -> DataError:
    """Word one error for all bad rows of a file.

    Args:
        path: the file, or what several are called together.
        bad: at least one bad row.
        total: rows in the file or files, good and bad.
        way_out: what to do.

    Returns:
        The error to raise; the first ``SHOWN_BAD_ROWS`` rows are shown, and all are counted.
    """
    if len(bad) == 1:
        return DataError(f"{bad[0].problem}\n{way_out}", path=bad[0].path or path, line=bad[0].line)
    shown = "\n".join(
        f"  {row.path}{', ' if row.path else ''}line {row.line}: {row.problem}"
        for row in bad[:SHOWN_BAD_ROWS]
    )
    rest = len(bad) - SHOWN_BAD_ROWS
    more = f"\n  ... and {rest} more" if rest > 0 else ""
    return DataError(f"{len(bad)} of {total} rows cannot be used:\n{shown}{more}\n{way_out}", path=path)


class RowsDigest:
    """Identifies conversations as they pass, whatever file format and layout held them."""

    def __init__(self) -> None:
        """Begin with none."""
        self._digest = sha256()

    def add(self, conversation: Conversation) -> None:
        """Take the next one in."""
        held: list[object] = [_identity(message) for message in conversation.messages]
        if conversation.rejected is not None:
            held.append({"rejected": _identity(conversation.rejected)})
        if conversation.desirable is not None:
            held.append({"desirable": conversation.desirable})
        self._digest.update(json.dumps(held, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        self._digest.update(b"\n")

    def hexdigest(self) -> str:
        """Return the hexadecimal sha256 of all that the messages hold."""
        return self._digest.hexdigest()


def _identity(message: Message) -> tuple[object, ...]:
    """Return what tells a message from others; a plain one's stays what it was before there were tools."""
    rest = (message.is_call, message.tools, message.has_loss)
    plain = (message.role, message.content, message.metadata)
    return plain if rest == (False, "", True) else (*plain, *rest)
