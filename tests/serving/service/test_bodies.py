"""Case 58: bodies of every kind but the right one, and what they may cost."""

from __future__ import annotations

import gzip
import json
import socket

import pytest

from tests.serving.service.served import CHAT, SHORT, Served, read_until, request_bytes

ROUTES = (CHAT, "/v1/completions", "/")
BODIES = {
    "not UTF-8": b'{"messages": "\xff\xfe"}',
    "a lone surrogate": b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "NaN": b'{"prompt": "x", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "nested brackets": b"[" * 100_000,
    "nested objects": b'{"a":' * 30_000,
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a text": b'"x"',
    "half of it": b'{"messages": [',
    "a zero byte": b'{"prompt": "x"}\x00',
    "a long number": b'{"prompt": "x", "messages": [], "max_tokens": 1' + b"0" * 5000 + b"}",
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", BODIES)
def test_case_58_bodies(served: Served, name: str, route: str) -> None:
    refused = served.ask(route, BODIES[name])
    assert 400 <= refused.status < 500
    assert len(refused.error["message"]) < 2000


@pytest.mark.parametrize("route", ROUTES)
def test_case_58_text_plain(served: Served, route: str) -> None:
    body = {"prompt": "你好", "max_length": 30} if route == "/" else SHORT | {"prompt": "你好"}
    reply = served.ask(route, body, Content_Type="text/plain")
    # `POST /` reads JSON whatever it is called, as the official server does: curl sends no better type by itself.
    assert reply.status == 200 if route == "/" else reply.status in (200, 400, 415)
    assert route == "/" or reply.status == 200 or reply.error


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "nonsense", "gzip, identity"])
def test_case_58_packed(served: Served, encoding: str) -> None:
    refused = served.ask(CHAT, gzip.compress(json.dumps(SHORT).encode()), Content_Encoding=encoding)
    assert (refused.status, refused.error["code"]) == (415, "unsupported_encoding")
    assert served.ask(CHAT, SHORT, Content_Encoding="identity").status == 200


def test_case_58_gigabyte_announced(served: Served) -> None:
    with served.connect() as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2**30}\r\n\r\n"
        client.sendall(head.encode() + b"x" * 1000)
        assert read_until(client, b"body_too_large").startswith(b"HTTP/1.1 413")


def test_case_58_gigabyte_sent(served: Served) -> None:
    """A client that sends on, whatever it is told, costs no memory and is dropped."""
    before = served.metric("process_resident_memory_bytes")
    num_sent, chunk = 0, b"400\r\n" + b"x" * 1024 + b"\r\n"
    with served.connect() as client:
        client.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        try:
            for _ in range(2**20):
                client.sendall(chunk)
                num_sent += 1024
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert num_sent > 200_000
    assert served.metric("process_resident_memory_bytes") < before + 64 * 2**20


def test_case_58_chunked(served: Served) -> None:
    body = json.dumps(SHORT).encode()
    fields = "Host: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\n{fields}".encode()
    with served.connect() as client:
        client.sendall(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        assert read_until(client, b"}").startswith(b"HTTP/1.1 200")
    with served.connect() as client:
        client.sendall(head + b"40000\r\n" + b"x" * 0x40000 + b"\r\n0\r\n\r\n")
        assert read_until(client, b"body_too_large").startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come(served: Served) -> None:
    whole = request_bytes(SHORT)
    with served.connect() as client:
        client.sendall(whole[:-5])
        assert read_until(client, b"body_timeout").startswith(b"HTTP/1.1 408")
    with served.connect() as client:
        client.sendall(whole[:-5])
        client.shutdown(socket.SHUT_WR)
        assert client.recv(65536) == b""
    assert served.ask("/health").status == 200


def test_expect_continue(served: Served) -> None:
    """As curl asks before it sends a long body: told to go on, or refused before it is sent."""
    body = json.dumps(SHORT).encode()
    with served.connect() as client:
        client.sendall(
            request_bytes(b"", headers="Expect: 100-continue\r\n").replace(
                b": 0\r\n", b": %d\r\n" % len(body)
            )
        )
        assert b"100 Continue" in read_until(client, b"\r\n\r\n")
        client.sendall(body)
        assert read_until(client, b"}").startswith(b"HTTP/1.1 200")
    with served.connect() as client:
        client.sendall(
            request_bytes(b"", headers="Expect: 100-continue\r\n").replace(b": 0\r\n", b": 900000000\r\n")
        )
        assert read_until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_what_is_no_request(served: Served, data: bytes) -> None:
    with served.connect() as client:
        client.sendall(data)
        try:
            got = client.recv(65536)
        except ConnectionResetError:
            got = b""
    assert got == b"" or got.startswith(b"HTTP/1.1 4")
    assert served.ask("/health").status == 200
