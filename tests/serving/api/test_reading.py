"""Requests are read one after the other, short ones past long ones, and not for those who left."""

from __future__ import annotations

import asyncio
import threading

import pytest

from glmtune.serving.api.errors import ApiError
from glmtune.serving.api.reading import SHORT_BYTES, RequestReader

LONG = b"x" * (SHORT_BYTES + 1)


def test_short_ones_pass_long_ones_and_each_kind_keeps_its_order() -> None:
    free, done, threads = threading.Event(), [], set[str]()

    def read(raw: bytes) -> int:
        threads.add(threading.current_thread().name)
        if len(raw) > SHORT_BYTES:
            assert free.wait(20)
        done.append(len(raw))
        return len(raw)

    async def ask() -> list[int]:
        reader = RequestReader()
        books = [asyncio.create_task(reader.read(read, LONG + bytes(more))) for more in (0, 1)]
        questions = [asyncio.create_task(reader.read(read, bytes(length))) for length in range(1, 40)]
        said = await asyncio.gather(*questions)
        assert not any(book.done() for book in books)
        free.set()
        return said + await asyncio.gather(*books)

    expected = [*range(1, 40), len(LONG), len(LONG) + 1]
    assert asyncio.run(ask()) == done == expected
    assert len(threads) == 2


def test_who_left_is_not_read() -> None:
    begun, free, read_bodies = threading.Event(), threading.Event(), []

    def read(raw: bytes) -> None:
        read_bodies.append(raw)
        begun.set()
        assert free.wait(20)

    async def ask() -> None:
        reader = RequestReader()
        first = asyncio.create_task(reader.read(read, b"first"))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        second = asyncio.create_task(reader.read(read, b"second"))
        third = asyncio.create_task(reader.read(read, b"third"))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        free.set()
        await asyncio.gather(first, third)

    asyncio.run(ask())
    assert read_bodies == [b"first", b"third"]


def test_what_is_wrong_with_a_body_is_told() -> None:
    def refuse(raw: bytes) -> None:
        raise ApiError(f"{len(raw)} bytes", code="invalid_json")

    with pytest.raises(ApiError, match="5 bytes"):
        asyncio.run(RequestReader().read(refuse, b"wrong"))
