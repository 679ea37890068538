"""Checksums of what lies on disk: whole files, lines of a journal or log, and JSON that is read back.

Disks, cables and memory change a byte now and then, and what reads it may go on with another number. Every
checksum here is an xxHash (XXH3), which finds accidents at the speed of memory. It is no seal against people:
whoever can change a file can change its checksum, too.

A line or a JSON object carries its checksum as its last key, `checksum`, so that both stay JSON that any
script reads. Those without one, of before there were checksums or written by hand, are taken as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import xxhash

KEY = "checksum"
BUFFER_BYTES = 4 << 20
"""Read at once: large enough that the disk, not Python's loop, decides the speed of hashing a file."""
DAMAGED = f"damaged: its content is not that of its checksum (whoever changed it by hand takes `{KEY}` out)"
# Whatever stands between the quotes is compared, so that a damaged checksum is damage, not absence.
_LAST_KEY = re.compile(rf'(?:, )?"{KEY}": "([^"]*)"\}}$')


def file_checksum(path: Path) -> str:
    """Return the XXH3-128 of a file's content, 32 hexadecimal digits, in bounded memory.

    Raises:
        OSError: the file cannot be read.
    """
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def with_checksum(values: Mapping[str, Any]) -> str:
    r"""Word values as one JSON line that ends in its checksum, line end included.

    Half a surrogate pair, which no UTF-8 can hold, is written as JSON's own escape.

    >>> with_checksum({"step": 1})
    '{"step": 1, "checksum": "553d08f037ffdb26"}\n'
    """
    text = json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    comma = ", " if values else ""
    return f'{text[:-1]}{comma}"{KEY}": "{_of_text(text)}"}}\n'


def checked_line(line: str) -> dict[str, Any]:
    """Return the values of a line, without their checksum.

    Args:
        line: as `with_checksum` made it, or any JSON object on one line; a line end may follow.

    Raises:
        ValueError: it is no JSON object, or not the one whose checksum it carries.
    """
    text = line.rstrip("\r\n")
    if found := _LAST_KEY.search(text):
        # The text is checked, not the values: two texts may mean the same, damage can only be in a text.
        text = text[: found.start()] + "}"
        if _of_text(text) != found[1]:
            raise ValueError(DAMAGED)
    return _parsed(text)


def json_with_checksum(values: Mapping[str, Any], *, apart: Container[str] = ()) -> dict[str, Any]:
    """Return values with their checksum as the last key, to be written in any layout.

    Args:
        values: plain ones.
        apart: keys that the checksum does not cover: those that differ from run to run (times, speeds), so
            that runs which did the same can be compared, checksum and all.
    """
    return {**values, KEY: _of_values(values, apart)}


def checked_json(text: str, *, apart: Container[str] = ()) -> dict[str, Any]:
    """Return what `json_with_checksum` was given, from the text of the file.

    Args:
        text: a JSON object.
        apart: as when it was made.

    Raises:
        ValueError: it is no JSON object, or not the one whose checksum it carries.
    """
    values = _parsed(text)
    if KEY in values and values.pop(KEY) != _of_values(values, apart):
        raise ValueError(DAMAGED)
    return values


def _of_text(text: str) -> str:
    return xxhash.xxh3_64(text.encode("utf-8", "backslashreplace")).hexdigest()


def _of_values(values: Mapping[str, Any], apart: Container[str]) -> str:
    covered = {name: value for name, value in values.items() if name not in apart}
    # As it will be read back (keys are texts then, tuples lists), sorted and without spaces: what a file
    # looks like is its writer's choice, what it says is not.
    return _of_text(json.dumps(json.loads(json.dumps(covered)), sort_keys=True, separators=(",", ":")))


def _parsed(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    return values
