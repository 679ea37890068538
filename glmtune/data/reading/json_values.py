"""One JSON value within bounds, and values and names worded for messages.

Python's decoder stops at two things by errors of its own kinds: brackets nested deeper than its stack, and
integers of more digits than it turns into numbers. Both come with a rule here, and are the row's fault.
"""

from __future__ import annotations

import decimal
import json
import math
import reprlib
from collections.abc import Iterable

from glmtune.data.records import RowProblem
from glmtune.storage.json_files import repeated_key

MAX_DEPTH = 100
MAX_DIGITS = 4000  # Python itself reads 4300
_SHOWN_NAMES = 20
_SHOWN_CHARACTERS = 80
_TOO_DEEP = f"its values are nested more than {MAX_DEPTH} deep, the most that is read. Flatten them."


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise RowProblem(
            f"a number has {len(digits)} digits, but at most {MAX_DIGITS} are read. Put it in quotes."
        )
    return int(digits)


class _WrittenFloat(float):
    """A fraction that remembers how the file writes it, so that an answer of 1.50 is learnt as such."""

    __slots__ = ("text",)

    def __new__(cls, text: str) -> _WrittenFloat:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.text,)


def text_of(value: object) -> str | None:
    """Return a string as it is and a number or truth value as its text; None for what has none.

    >>> text_of("a"), text_of(18), text_of(0.5), text_of(True), text_of(None), text_of(float("nan"))
    ('a', '18', '0.5', 'true', None, None)
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"  # as JSON writes them, whatever held them
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, float | decimal.Decimal) or not math.isfinite(value):
        return None
    if isinstance(value, _WrittenFloat):
        return value.text
    return format(value, "f") if isinstance(value, decimal.Decimal) else str(value)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = clipped(repeated_key(pairs))
        raise RowProblem(f"the key `{twice}` occurs twice in one object. Keep one of them.")
    return values


# Python keeps the last of two equal keys in silence; in a data file one of the two texts would be lost.
_STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_int=_whole_number, parse_float=_WrittenFloat)
_LENIENT = json.JSONDecoder(parse_int=_whole_number, parse_float=_WrittenFloat)
_NO_RULES = json.JSONDecoder(parse_int=len)


def read_value(text: str, position: int = 0) -> tuple[object, int]:
    """Read the value that begins at a position.

    Args:
        text: holds more, perhaps.
        position: of its first character.

    Returns:
        The value and where it ends.

    Raises:
        json.JSONDecodeError: it is no JSON.
        RowProblem: it is, but has a key twice, or goes beyond a bound.
    """
    return _bounded(_STRICT, text, position)


def read_text(text: str) -> object:
    """Read JSON that a row holds as text, such as the arguments of a tool call.

    Raises:
        ValueError: it is no JSON, or more than one value.
        RowProblem: it goes beyond a bound.
    """
    text = text.strip()
    value, end = _bounded(_LENIENT, text, 0)
    if end < len(text):
        raise ValueError(f"more text follows the value: {text[end : end + 20]!r}")
    return value


def end_of_value(text: str, position: int = 0) -> int | None:
    """Return where a value ends whatever bounds it breaks; None where it is nested too deep to tell.

    Raises:
        json.JSONDecodeError: it is no JSON.
    """
    try:
        return _NO_RULES.raw_decode(text, position)[1]
    except RecursionError:
        return None


def _bounded(decoder: json.JSONDecoder, text: str, position: int) -> tuple[object, int]:
    try:
        value, end = decoder.raw_decode(text, position)
    except RecursionError:
        raise RowProblem(_TOO_DEEP) from None
    # Counting brackets is quick, and few rows have so many that looking closer is worth it. Whoever walks or
    # prints a value later has a stack of his own to think of, so the bound is far below Python's.
    if text.count("[", position, end) + text.count("{", position, end) > MAX_DEPTH:
        _check_depth(value)
    return value, end


def _check_depth(value: object) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for part in level
            if isinstance(part, dict | list)
            for item in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return
    if any(isinstance(part, dict | list) for part in level):
        raise RowProblem(_TOO_DEEP)


_glimpses = reprlib.Repr()
_glimpses.maxlevel = 3
_glimpses.maxstring = _glimpses.maxother = 40


def kind_of(value: object) -> str:
    """Name a JSON value for messages, with a glimpse of it, however large it is.

    >>> kind_of(["a", "b"])
    "a list (['a', 'b'])"
    """
    names: Iterable[tuple[type, str]] = (
        (bool, "a truth value"),
        (str, "a string"),
        (int, "a number"),
        (float, "a number"),
        (list, "a list"),
        (dict, "an object"),
    )
    if value is None:
        return "null"
    glimpse = _glimpses.repr(value)
    glimpse = glimpse if len(glimpse) <= 40 else glimpse[:37] + "..."
    name = next((name for kind, name in names if isinstance(value, kind)), f"of type {type(value).__name__}")
    return f"{name} ({glimpse})"


def clipped(text: str) -> str:
    """Return a text short enough for a message."""
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def listed(names: Iterable[object]) -> str:
    """List names for a message, the first ones where they are many.

    >>> listed(["a", "b"]), listed([])
    ('a, b', 'none')
    """
    words = [clipped(str(name)) for name in names]
    more = [f"and {len(words) - _SHOWN_NAMES} more"] if len(words) > _SHOWN_NAMES else []
    return ", ".join([*words[:_SHOWN_NAMES], *more]) or "none"
