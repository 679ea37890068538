"""What the protocol drops: heads that do not come, replies that nobody reads; on sockets, without a model."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from glmtune.listening import listen
from glmtune.serving.service.connections import guarded_protocol
from glmtune.serving.settings import LimitSettings

CHUNK = b"x" * 4096


class Talker:
    """An application that sends 64 MiB a reply, and counts what it was let send."""

    num_sent = 0
    num_ended = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        num_chunks = 1 if scope["path"] == "/short" else 16384
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for place in range(num_chunks):
            await send({"type": "http.response.body", "body": CHUNK, "more_body": place < num_chunks - 1})
            self.num_sent += 1
        self.num_ended += 1


@contextmanager
def talking(talker: Talker, limits: LimitSettings) -> Iterator[int]:
    """Run the application while the block runs; its port."""
    sockets = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        talker, http=guarded_protocol(limits), ws="none", lifespan="off", log_config=None, loop="asyncio"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets)))
    thread.start()
    try:
        yield sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def connect(port: int, receive_bytes: int | None = None) -> socket.socket:
    client = socket.socket()
    if receive_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(60)
    client.connect(("127.0.0.1", port))
    return client


def read_to_the_end(client: socket.socket) -> int:
    """Return how many bytes came until the other side closed or reset the connection."""
    num_bytes = 0
    try:
        while data := client.recv(65536):
            num_bytes += len(data)
    except ConnectionResetError:
        pass
    return num_bytes


def test_case_49_reply_that_nobody_reads_is_bounded_and_dropped() -> None:
    talker = Talker()
    with talking(talker, LimitSettings(send_seconds=0.5)) as port:
        with connect(port, 2048) as idle:
            idle.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            deadline = time.monotonic() + 60
            while not talker.num_ended:  # once it is dropped, what it sends goes nowhere, at once
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert read_to_the_end(idle) < 2**20


def test_case_49_slow_reader_is_kept() -> None:
    talker = Talker()
    with talking(talker, LimitSettings(send_seconds=0.5)) as port, connect(port, 65536) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        first = slow.recv(1000)
        time.sleep(0.2)
        assert len(first) + read_to_the_end(slow) > 64 * 2**20


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: h\r\nX-Slow: "])
def test_a_head_that_does_not_come(sent: bytes) -> None:
    with talking(Talker(), LimitSettings(header_seconds=0.3)) as port, connect(port) as client:
        client.sendall(sent)
        assert read_to_the_end(client) == 0


def test_a_second_head_that_does_not_come() -> None:
    with talking(Talker(), LimitSettings(header_seconds=0.3)) as port, connect(port) as client:
        client.sendall(b"GET /short HTTP/1.1\r\nHost: h\r\n\r\n")
        got = b""
        while not got.endswith(b"\r\n0\r\n\r\n"):
            got += client.recv(65536)
        client.sendall(b"GET /short HTTP/1.1\r\nX-Slow: ")
        assert read_to_the_end(client) == 0


def test_several_requests_on_one_connection() -> None:
    talker = Talker()
    with talking(talker, LimitSettings(header_seconds=0.3)) as port, connect(port) as client:
        for number in range(1, 4):
            client.sendall(b"GET /short HTTP/1.1\r\nHost: h\r\n\r\n")
            got = b""
            while not got.endswith(b"\r\n0\r\n\r\n"):
                got += client.recv(65536)
            assert got.startswith(b"HTTP/1.1 200"), number
            time.sleep(0.4)  # idle for longer than a head may take
