"""Streams of server-sent events: ``data:`` lines and comments alone, ended by ``data: [DONE]``.

OpenAI's Python client fails on events without data (``retry:``, ``event:``), so nothing else is ever sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from glmtune.errors import GlmtuneError
from glmtune.inference.requests.chat import AnswerEvent
from glmtune.serving.api.errors import as_api_error, json_bytes
from glmtune.serving.api.replies.chat import Json
from glmtune.serving.api.running import ClientGoneError, RunningRequest

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = {
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold chunks back
}


class Chunks(Protocol):
    """Turns events into chunks."""

    def opening(self) -> list[Json]:
        """Return what comes before all events."""
        ...

    def chunks(self, index: int, event: AnswerEvent) -> list[Json]:
        """Return the chunks of an event of an answer."""
        ...

    def closing(self) -> list[Json]:
        """Return what comes when all answers have ended."""
        ...


class EventStream(Response):
    """Sends the answers of a request as they are written; what goes wrong on the way is an event too."""

    media_type = "text/event-stream"

    def __init__(
        self,
        running: RunningRequest,
        chunks: Chunks,
        *,
        keep_alive_seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Take what runs and what writes it."""
        super().__init__(headers={**_HEADERS, **(headers or {})})
        del self.headers["content-length"]  # of the empty body that `Response` believes in
        self._running, self._chunks, self._keep_alive = running, chunks, keep_alive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; called by the server with the request's own channels."""

        async def send_body(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async with self._running.watched(receive):
            try:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send_body(_events(self._chunks.opening()))
                async for batch in self._running.batches(keep_alive_seconds=self._keep_alive):
                    made = [chunk for index, event in batch for chunk in self._chunks.chunks(index, event)]
                    if made or not batch:
                        await send_body(_events(made) or KEEP_ALIVE)
                last = _events(self._chunks.closing())
            except ClientGoneError:
                return
            except GlmtuneError as error:
                last = _events([as_api_error(error).body])
            await send_body(last + DONE)
            await send_body(b"", more=False)


def _events(chunks: list[Json]) -> bytes:
    return b"".join(b"data: " + json_bytes(chunk) + b"\n\n" for chunk in chunks)
