"""A server with OpenAI's interface that says what a test tells it to, over real sockets."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Generator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = {
    "object": "list",
    "data": [
        {"id": "glm-tiny", "object": "model", "parent": None},
        {"id": "style", "object": "model", "parent": "glm-tiny", "kind": "prefix"},
        {"id": "law", "object": "model", "parent": "glm-tiny", "kind": "lora"},
    ],
}


class ScriptedServer:
    """What is answered, and what was asked.

    Attributes:
        models: status and content of the list.
        status: of answers.
        kind: content type of answers.
        pieces: of the body of an answer, sent one by one; None waits until the client has gone.
        asked: bodies of the questions.
        headers: of the last request.
        is_left: set once a client went away.
    """

    def __init__(self) -> None:
        self.models: tuple[int, Any] = (200, MODELS)
        self.status, self.kind = 200, "text/event-stream; charset=utf-8"
        self.pieces: Sequence[bytes | None] = ()
        self.extra: dict[str, str] = {}
        self.asked: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.is_left = threading.Event()
        self.url = ""


def sse(*contents: Any) -> list[bytes]:
    """Return events, one piece each."""
    return [
        f"data: {each if isinstance(each, str) else json.dumps(each, ensure_ascii=False)}\n\n".encode()
        for each in contents
    ]


def delta(**fields: Any) -> dict[str, Any]:
    """Return a chunk."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def end(reason: str = "stop") -> dict[str, Any]:
    """Return the chunk that ends a choice."""
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


@contextlib.contextmanager
def scripted_server() -> Generator[ScriptedServer]:
    """Run a server on a free port of this machine."""
    script = ScriptedServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            script.headers = dict(self.headers.items())
            status, content = script.models
            self._reply(status, json.dumps(content).encode())

        def do_POST(self) -> None:
            script.headers = dict(self.headers.items())
            body = self.rfile.read(int(self.headers["Content-Length"]))
            script.asked.append({"path": self.path, **json.loads(body)})
            if script.kind == "application/json":
                self._reply(script.status, b"".join(piece or b"" for piece in script.pieces))
                return
            if not (script.pieces and script.pieces[0] is None):
                self._head()
            for piece in script.pieces:
                if piece is None:
                    self.connection.settimeout(30)
                    if not self.connection.recv(1):
                        script.is_left.set()
                    self.close_connection = True
                    return
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

        def _head(self) -> None:
            self.send_response(script.status)
            self.send_header("Content-Type", script.kind)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()

        def _reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            for name, value in script.extra.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
