"""Replies in one piece: gathered while the answers are written, dropped when nobody waits for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from glmtune.inference.requests.chat import AnswerEvent
from glmtune.serving.api.errors import json_bytes
from glmtune.serving.api.replies.chat import Json
from glmtune.serving.api.running import ClientGoneError, RunningRequest

CLIENT_GONE = 499
"""Status of a reply that nobody reads; nginx writes it for the same."""


class Gathers(Protocol):
    """Gathers events to a reply."""

    def add(self, index: int, event: AnswerEvent) -> None:
        """Take the next event of an answer."""
        ...

    def json(self) -> Json:
        """Return the reply, once all answers have ended."""
        ...


async def gathered(
    running: RunningRequest, reply: Gathers, request: Request, headers: Mapping[str, str] | None = None
) -> Response:
    """Wait for all answers and return them; a client that goes away ends them.

    FastAPI does not tell a handler that its client left, so the request's channel is watched here.

    Args:
        running: what was asked.
        reply: what is made of it.
        request: whose client waits.
        headers: to send with it.

    Raises:
        ApiError: an answer failed.
    """
    async with running.watched(request.receive):
        try:
            async for batch in running.batches():
                for index, event in batch:
                    reply.add(index, event)
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
    return Response(json_bytes(reply.json()), headers=dict(headers or {}), media_type="application/json")
