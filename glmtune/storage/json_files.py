"""Read a JSON file that came with a checkpoint: strangers wrote it, so its size and shape are bounded.

Python's reader takes more than JSON: ``NaN``, the same key twice (the last one wins, so two tools may read
two different files), and nesting until the stack ends. Each of them is refused by name here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from glmtune.errors import CheckpointError

MAX_JSON_BYTES = 16 * 2**20
"""Of a file and of the header of a weight file: the index of the largest release takes 50 KB."""
SHOWN_CHARACTERS = 60


def read_json_object(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        CheckpointError: it cannot be read, is longer than `MAX_JSON_BYTES`, or holds no JSON object.
    """
    try:
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"it has {size} bytes, at most {MAX_JSON_BYTES} are read")
        content = parse_json(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is no valid JSON ({error}). Fetch the file again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, but it must be a JSON object.")
    return content


def parse_json(content: bytes) -> Any:
    """Parse JSON as the standard has it.

    Raises:
        ValueError: it is none; or it holds a key twice, ``NaN`` or ``Infinity``, an integer of thousands of
            digits, or is nested too deeply.
    """
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_no_number
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def shown(value: object) -> str:
    """Word a value for a message, cut where it is long: a number of a file may have 4,000 digits.

    >>> shown("28"), len(shown(10**400))
    ("'28'", 63)
    """
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def repeated_key(pairs: Sequence[tuple[str, object]]) -> str:
    """Return the first key that stands twice in an object which has such a one; in one pass over them."""
    seen: set[str] = set()
    return next(name for name, _ in pairs if name in seen or seen.add(name))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"the key {shown(repeated_key(pairs))} is there twice")
    return made


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")
