"""Servers that answer with bytes of one's own choice, or not at all, on real sockets of this machine."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

MODELS = {"data": [{"id": "m", "max_model_len": 512}]}


@dataclass
class Request:
    """What came in, and the connection to answer on."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: socket.socket

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def reply(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        fields = {"Content-Length": str(len(data)), "Connection": "close"}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.send(f"HTTP/1.1 {status} Said\r\n{lines}\r\n".encode() + data)


Act = Callable[[Request], None]


@dataclass
class RawServer:
    """Hands each request but that for the models to ``act``."""

    url: str = ""
    port: int = 0
    requests: list[Request] = field(default_factory=list)


@contextmanager
def raw_server(act: Act, *, models: Any = MODELS) -> Iterator[RawServer]:
    """Run a server while the block runs; ``models`` is the list of models, or what answers the request for it."""
    server = RawServer()
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    server.port = listener.getsockname()[1]
    server.url = f"http://127.0.0.1:{server.port}/v1"
    connections: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        with suppress(OSError, ValueError), connection:
            request = _read(connection)
            server.requests.append(request)
            if request.method == "GET" and not callable(models):
                request.reply(models)
            else:
                (models if request.method == "GET" else act)(request)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def _read(connection: socket.socket) -> Request:
    data = b""
    while b"\r\n\r\n" not in data:
        data += _some(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += _some(connection)
    method, path, _ = first.split(" ")
    return Request(method, path, headers, body, connection)


def _some(connection: socket.socket) -> bytes:
    part = connection.recv(65536)
    if not part:
        raise OSError("closed")
    return part


def completion(text: str | None, reason: str = "stop") -> dict[str, Any]:
    """An answer to a prompt of plain text."""
    return {
        "choices": [{"text": text, "finish_reason": reason}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }
