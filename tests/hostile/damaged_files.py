"""Files as they come back from disks, editors and other tools: strategies that spoil a valid one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

DEEP = "@deep@"
"""Stands for a value nested 100,000 deep, which no `json.dumps` writes."""
DEPTH = 100_000
STRANGE = (
    None, True, "", "x", "\ud800", "\x1b[2J[red]", -1, 0, 10**30, -(10**400), 1.5, float("nan"), float("inf"),
    -float("inf"), [], [None], {}, {"x": [1]}, [[1, 2], "x"], "9" * 5000, DEEP,
)  # fmt: skip


def in_json(values: Any) -> str:
    """Write values with what Python's encoder refuses."""
    text = json.dumps(values, ensure_ascii=True)
    return text.replace(f'"{DEEP}"', "[" * DEPTH + "]" * DEPTH)


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where each value of nested ones is."""
    inner: Any = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(values: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """Return a copy with one value changed by its container and key."""
    copy = json.loads(json.dumps(values))
    holder = copy
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return copy


@st.composite
def spoiled_values(draw: st.DrawFn, values: Any) -> str:
    """A JSON text of which one value is gone or another; its checksum is taken out, as by whoever edits it."""
    values = {key: value for key, value in values.items() if key not in ("checksum", "answers_checksum")}
    path = draw(st.sampled_from(sorted(places(values), key=str)))
    if draw(st.booleans()):
        return in_json(changed(values, path, lambda holder, key: holder.pop(key)))
    strange = draw(st.sampled_from(STRANGE))
    return in_json(changed(values, path, lambda holder, key: holder.__setitem__(key, strange)))


@st.composite
def spoiled_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file cut off, doubled, overwritten, emptied, or in another encoding."""
    place = draw(st.integers(0, len(content)))
    text = content.decode()
    return draw(
        st.sampled_from(
            [
                content[:place],
                content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :],
                content[:place] + b"\x00" * 64 + content[place + 64 :],
                content + content,
                content[place:] + content[:place],
                b"",
                b"\n" * 9,
                b"\xef\xbb\xbf" + content,
                text.encode("utf-16"),
                text.encode("gb18030", "replace"),
                b"null\n",
                b"[]\n",
                b"[" * DEPTH,
                b'{"a":' * DEPTH,
                content.replace(b"\n", b"\r\n"),
                content.replace(b"\n", b"\xe2\x80\xa8"),
            ]
        )
    )
