"""A local server with OpenAI's interface: what the backend sends is recorded, what it gets is scripted."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]


@dataclass
class Server:
    """Answers with what ``reply`` makes of a request, after the replies queued for any request.

    Attributes:
        reply: path and body → status, content (JSON, or text as it is), and headers.
        queue: replies given first, one per request.
        requests: path and body of each request so far.
        headers: of each request so far.
        models_status: of the list of models.
        most_at_once: requests that were under way together.
    """

    reply: Callable[[str, Any], Reply]
    models_status: int = 200
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "m", "max_model_len": 512}])
    queue: list[Reply] = field(default_factory=list)
    requests: list[tuple[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, body: Any, headers: dict[str, str]) -> Reply:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.headers.append(headers)
            if body is not None:
                self.requests.append((path, body))
            queued = self.queue.pop(0) if self.queue and body is not None else None
        try:
            if queued is not None:
                return queued
            return (self.models_status, {"data": self.models}) if body is None else self.reply(path, body)
        finally:
            with self._lock:
                self._at_once -= 1


@contextmanager
def serve(reply: Callable[[str, Any], Reply], **settings: Any):
    """Run a server on a free port while the block runs."""
    server = Server(reply, **settings)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            status, content, *more = server.answer(self.path, body, dict(self.headers))
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            for name, value in (more[0] if more else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{listener.server_port}/v1"
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
