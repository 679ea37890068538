"""The routes on a real socket: an application of ours in uvicorn, in a thread of this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import uvicorn
from fastapi import FastAPI

from glmtune.serving.api.errors import install_error_handlers
from glmtune.serving.api.router import create_router
from glmtune.serving.api.state import ServingState


@dataclass
class RunningServer:
    """A server, its state, and how to ask it."""

    url: str
    state: ServingState
    app: FastAPI

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """Post JSON, or with ``content=`` and ``headers=`` anything."""
        settings = {"json": body} if "content" not in options else {}
        return httpx.post(self.url + path, timeout=60, **settings, **options)

    def chat(self, text: str = "你好", **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def completion(self, prompt: Any, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)


@contextmanager
def serving(state: ServingState) -> Iterator[RunningServer]:
    """Serve the routes until the block ends."""
    app = FastAPI()
    install_error_handlers(app)
    app.include_router(create_router(state))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield RunningServer(f"http://127.0.0.1:{listener.getsockname()[1]}", state, app)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def events(reply: httpx.Response) -> list[str]:
    """Return what a stream's events hold; every other line must be empty or a comment."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = reply.content.decode("utf-8").split("\n")
    assert all(line == "" or line.startswith(("data: ", ": ")) for line in lines), lines
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
