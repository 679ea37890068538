"""A stand-in of the hub for tests: the endpoints that huggingface_hub asks, over HTTP on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is on the hub, and what was asked of it.

    Attributes:
        repositories: id → file name → content.
        gated: ids that answer 401 as gated ones do.
        files_sent: (id, file) of every body sent.
        url: where it listens.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    files_sent: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub from a thread."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            is_api = path.startswith("api/models/")
            parts = path.removeprefix("api/models/").split("/")
            repository, rest = "/".join(parts[:2]), parts[2:]
            if repository in hub.gated:
                self.send(403, b"gated", {"X-Error-Code": "GatedRepo"}, with_body=with_body)
            elif repository not in hub.repositories:
                self.send(404, b"none", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)
            elif is_api:
                self.send(200, json.dumps(listing(hub, repository, rest)).encode(), {}, with_body=with_body)
            elif (name := "/".join(rest[2:])) in hub.repositories[repository]:
                content = hub.repositories[repository][name]
                tag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
                self.send(200, content, tag, with_body=with_body)
                if with_body:
                    hub.files_sent.append((repository, name))
            else:
                self.send(404, b"none", {"X-Error-Code": "EntryNotFound"}, with_body=with_body)

        def send(self, status: int, content: bytes, headers: dict[str, str], *, with_body: bool) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def listing(hub: Hub, repository: str, rest: list[str]) -> object:
    """Return what ``/revision/main`` (facts) and ``/tree/COMMIT`` (files) answer."""
    files = hub.repositories[repository]
    if rest[:1] == ["tree"]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
    return {
        "id": repository,
        "modelId": repository,
        "sha": COMMIT,
        "siblings": [{"rfilename": n} for n in files],
    }
