"""Server-sent events read as data: what one holds is JSON of a stranger, bounded like all of it.

Lines end in LF, CR or CRLF and nothing else: U+2028 inside a text, which libraries that split "lines" would
cut at, is a character like others. Comments and all fields but ``data`` are passed over.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

MAX_EVENT_BYTES = 4 * 2**20
"""Of one event: the longest answer in a single piece stays far below it."""


async def event_data(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the data of every event.

    Args:
        chunks: of the body, cut anywhere.

    Raises:
        ValueError: an event is longer than `MAX_EVENT_BYTES`.
    """
    data: list[bytes] = []
    async for line in _lines(chunks):
        if line:
            field, _, value = line.partition(b":")
            if field == b"data":
                data.append(value.removeprefix(b" "))
        elif data:
            yield b"\n".join(data)
            data = []
        if sum(map(len, data)) > MAX_EVENT_BYTES:
            raise ValueError(f"an event is longer than {MAX_EVENT_BYTES:,} bytes, the limit")
    if data:  # the connection ended without the empty line; what came is whole or no JSON
        yield b"\n".join(data)


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest, ends_in_cr = b"", False
    async for chunk in chunks:
        if ends_in_cr and chunk[:1] == b"\n":  # the second half of a CRLF
            chunk = chunk[1:]
        if not chunk:
            ends_in_cr = False
            continue
        ends_in_cr = chunk[-1:] == b"\r"
        *lines, rest = (rest + chunk).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            yield line
        if len(rest) > MAX_EVENT_BYTES:
            raise ValueError(f"a line is longer than {MAX_EVENT_BYTES:,} bytes, the limit")
    if rest:
        yield rest
