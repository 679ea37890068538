"""Read JSON rows with their real line numbers: arrays (pretty-printed or not), JSON Lines, loose objects.

The json module reads an array as one value and tells where it failed, but not where its 12,000th row began,
and "row 12,000" is of no use in an editor. So an array is read row by row with `raw_decode`, which returns
where each value ends; a bad row then has a line, and the rows behind it are still read.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator

from glmtune.data.reading.json_values import end_of_value, kind_of, read_value
from glmtune.data.records import BadRow, RawRow, RowProblem
from glmtune.errors import DataError

_BLANK = re.compile(r"[ \t\r\n]*")


def iterate_json_rows(text: str, path: str, bad: list[BadRow]) -> tuple[str, Iterator[RawRow]]:
    """Read the rows of a JSON file one by one, whatever its extension says about arrays or lines.

    Args:
        text: the decoded file, not blank.
        path: the file, for messages.
        bad: takes the rows that cannot be used, as they are met.

    Returns:
        ``json`` or ``jsonl``, and the rows.

    Raises:
        DataError: the file is no JSON, or (while reading) it breaks off or goes wrong where no further row
            can be found.
    """
    start = _skip_blank(text, 0)
    if text[start] == "[":
        return "json", _array_rows(text, start + 1, path, bad)
    if text[start] != "{":
        raise DataError(
            f"a JSON data file starts with `[` or `{{`, but this one starts with"
            f" {text[start : start + 20]!r}. Give rows as a JSON array or as one object per line.",
            path=path,
            line=text.count("\n", 0, start) + 1,
        )
    first_line = text[start : _line_end(text, start)]
    if is_row(first_line) or not _starts_object_over_lines(text, start):
        return "jsonl", line_rows(_lines_of(text), bad)
    return "json", _object_rows(text, start, path, bad)


def is_row(line: str) -> bool:
    """Say whether the first line of a file is a row of its own, as in JSON Lines."""
    return _is_json(line.strip().rstrip(","))


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _lines_of(text: str) -> Iterator[str]:
    # Not str.splitlines: U+2028 and friends are legal inside JSON strings. Nor str.split, which would hold
    # the file twice.
    start = 0
    while start <= len(text):
        end = _line_end(text, start)
        yield text[start:end]
        start = end + 1


def _skip_blank(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    assert match is not None
    return match.end()


def _is_json(text: str) -> bool:
    try:
        return end_of_value(text) in (len(text), None)
    except ValueError:
        return False


def _starts_object_over_lines(text: str, start: int) -> bool:
    """Say whether the file begins with a pretty-printed object (else its first line is simply broken)."""
    try:
        end_of_value(text, start)
    except ValueError:
        # Pretty printing leaves lines that start with a quote or a bracket; JSON Lines all start with `{`.
        lines = [line.strip() for line in text[start:].split("\n", 6)[1:6]]
        return any(line[:1] in ('"', "}", "]") for line in lines)
    return True


class _Lines:
    """Line numbers of character positions, in one pass over the text."""

    def __init__(self, text: str) -> None:
        # Line ends once, then a bisection per row: counting from the start for every row is quadratic.
        self._ends = [match.start() for match in re.finditer("\n", text)]

    def of(self, position: int) -> int:
        return bisect_right(self._ends, position - 1) + 1


def line_rows(lines: Iterable[str], bad: list[BadRow]) -> Iterator[RawRow]:
    """Read JSON Lines.

    Args:
        lines: of the file, from the first one on, with or without their ends.
        bad: takes the rows that cannot be used, as they are met.
    """
    for number, text in enumerate(lines, start=1):
        line = text.strip()
        if not line:
            continue
        try:
            value, end = read_value(line)
            if end < len(line):
                raise json.JSONDecodeError("Extra data", line, end)
        except json.JSONDecodeError as error:
            bad.append(BadRow(number, _explain_line(line, error)))
        except RowProblem as problem:
            bad.append(BadRow(number, str(problem)))
        else:
            yield from _row_of(value, number, bad)


def _explain_line(line: str, error: json.JSONDecodeError) -> str:
    if line.endswith(",") and _is_json(line[:-1]):
        return "the line ends with a comma. Delete it, or put the whole file in `[` and `]`."
    near = line[max(0, error.pos - 15) : error.pos + 15]
    if error.pos >= len(line) or error.msg.startswith("Unterminated string"):
        return (
            f"the JSON breaks off: the line ends inside the object, after {line[-20:]!r}. Complete the line."
        )
    return f"no valid JSON at column {error.colno} ({error.msg.lower()}), near {near!r}. Correct the line."


def _row_of(value: object, line: int, bad: list[BadRow]) -> Iterator[RawRow]:
    if isinstance(value, dict):
        yield RawRow(value, line)
    else:
        bad.append(BadRow(line, f"a row must be a JSON object like {{...}}, but it is {kind_of(value)}."))


def _array_rows(text: str, position: int, path: str, bad: list[BadRow]) -> Iterator[RawRow]:
    lines = _Lines(text)
    position = _skip_blank(text, position)
    after_comma = False
    is_empty = True
    while text[position : position + 1] != "]" or after_comma:
        line = lines.of(position)
        if after_comma and text[position : position + 1] == "]":
            raise DataError("a comma stands before the closing `]`. Delete it.", path=path, line=line)
        row, position = _take(text, position, line, path, bad)
        is_empty = False
        yield from row
        mark = text[position : position + 1]
        after_comma = mark == ","
        if after_comma:
            position = _skip_blank(text, position + 1)
        elif mark != "]":
            here = lines.of(position)
            found = repr(text[position : position + 20]) if mark else "the end of the file"
            raise DataError(
                f"after the row of line {line} a comma or `]` must follow, but there is {found}."
                + ("" if mark else " The file is incomplete: copy or download it again."),
                path=path,
                line=here,
            )
    rest = text[_skip_blank(text, position + 1) :]
    if rest:
        raise DataError(
            f"more text follows the closing `]`: {rest[:20]!r}. Keep one array, or one object per"
            " line without `[`.",
            path=path,
            line=lines.of(len(text) - len(rest)),
        )
    if is_empty:
        raise DataError("the array is empty. A data file needs at least one row.", path=path)


def _object_rows(text: str, position: int, path: str, bad: list[BadRow]) -> Iterator[RawRow]:
    lines = _Lines(text)
    while position < len(text):
        row, position = _take(text, position, lines.of(position), path, bad)
        yield from row
        if text[position : position + 1] == ",":
            raise DataError(
                "a comma stands between two objects outside an array. Put the whole file in `[` and `]`.",
                path=path,
                line=lines.of(position),
            )


def _take(text: str, position: int, line: int, path: str, bad: list[BadRow]) -> tuple[Iterator[RawRow], int]:
    """Read one value; return its row, if it is one, and where the next non-blank character is."""
    try:
        value, position = read_value(text, position)
    except RowProblem as problem:
        bad.append(BadRow(line, str(problem)))
        end = _end_behind(text, position, line, path)
        if end is None:
            raise DataError(f"no row can be read from here on: {problem}", path=path, line=line) from None
        return iter(()), _skip_blank(text, end)
    except json.JSONDecodeError as error:
        raise _broken(text, error, line, path) from None
    return _row_of(value, line, bad), _skip_blank(text, position)


def _end_behind(text: str, position: int, line: int, path: str) -> int | None:
    """Find the end of a value that broke a rule in its middle, to go on behind it."""
    try:
        return end_of_value(text, position)
    except json.JSONDecodeError as error:
        raise _broken(text, error, line, path) from None


def _broken(text: str, error: json.JSONDecodeError, line: int, path: str) -> DataError:
    # Six characters: a file may end inside `\u1234` or `false`, whose start is where the parser points.
    rest = text[error.pos :].strip()
    if (len(rest) < 6 and not rest.endswith(("}", "]"))) or error.msg.startswith("Unterminated string"):
        what = f"the file is truncated: it ends inside the row of line {line}. Copy or download it again."
    else:
        near = text[max(0, error.pos - 15) : error.pos + 15]
        what = (
            f"no valid JSON at column {error.colno} ({error.msg.lower()}), near {near!r}, in the row of"
            f" line {line}. Correct it (a comma after the last field is not allowed)."
        )
    return DataError(what, path=path, line=error.lineno)
