"""Which requests are taken on: not while loading or draining, not too many, body and time within limits.

The body is read here, whole and bounded, before a route sees the request: a route then never meets a body
that is too long, too slow or packed. A request runs as a task of its own, so that it can be ended from
outside: at its time limit, and when the server ends. Its stream then closes with an error event instead of
breaking off.
"""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from glmtune.serving.api.errors import ApiError, json_bytes
from glmtune.serving.api.state import ServingState
from glmtune.serving.service.asgi import AsgiApp, Message, Receive, Scope, Send, header, send_error
from glmtune.serving.settings import LimitSettings

UNGATED = frozenset({"/health", "/metrics", "/openapi.json"})
"""Answered in every phase, and never counted."""
CANCEL_SECONDS = 2.0
"""Longest time that a request is given to notice that it was cancelled."""
CLIENT_GONE = 499
"""No status of HTTP; nginx writes it for the same."""
End = Literal["shutdown", "too_old", "client_gone"]
WHY: dict[End, tuple[int, str, str]] = {
    "shutdown": (503, "server_shutdown", "The server is shutting down; send the request again."),
    "client_gone": (CLIENT_GONE, "client_gone", "The client left."),  # for the log: nobody reads it
    "too_old": (504, "request_timeout", "The request took longer than the server allows."),
}


def _error(status: int, code: str, message: str) -> ApiError:
    # No `Connection: close`: with the rest of a body on its way the client would see a reset, and no reply.
    # What still comes is dropped, and `connections` bounds for how long.
    headers = {429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}.get(status)
    return ApiError(message, status=status, code=code, headers=headers)


class Running:
    """One request that is being answered.

    Attributes:
        ended: resolved with the reason when it is ended from outside.
    """

    def __init__(self) -> None:
        """Begin."""
        self.ended: asyncio.Future[End] = asyncio.get_running_loop().create_future()

    def end(self, why: End) -> None:
        """End it; the first reason counts."""
        if not self.ended.done():
            self.ended.set_result(why)


class Gate:
    """Middleware: takes requests on and can end them.

    Attributes:
        running: what is being answered; the probes of `UNGATED` and the page are never among these.
    """

    def __init__(self, app: AsgiApp, state: ServingState, limits: LimitSettings) -> None:
        """Stand before an application."""
        self._app, self._state, self._limits = app, state, limits
        self.running: set[Running] = set()

    def end_all(self, why: End) -> None:
        """End every request now."""
        for each in self.running:
            each.end(why)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take a request on, or refuse it."""
        is_page = scope.get("path") == "/" and scope.get("method") in ("GET", "HEAD")
        if scope["type"] != "http" or is_page or scope["path"] in UNGATED:
            return await self._app(scope, receive, send)
        running = Running()
        try:
            self._check(scope)
            self.running.add(running)
            body = await self._body(receive)
            if body is not None:
                await self._answer(scope, body, receive, send, running)
        except ApiError as error:
            await send_error(send, error)
        finally:
            self.running.discard(running)

    def _check(self, scope: Scope) -> None:
        """Refuse what needs no look at the body."""
        self._state.ready()
        if len(self.running) >= self._limits.max_requests:
            raise _error(
                429,
                "too_many_requests",
                f"{len(self.running)} requests are being answered, and the server takes"
                f" {self._limits.max_requests} at once (`limits.max_requests`). Ask again in a moment.",
            )
        packed = (header(scope, "content-encoding") or "identity").strip().lower()
        if packed != "identity":
            raise _error(
                415,
                "unsupported_encoding",
                f"The body is encoded as `{packed[:40]}`, but the server reads plain bodies only. Send it"
                " without Content-Encoding.",
            )
        length = header(scope, "content-length") or "0"
        if length.isdecimal() and int(length[:20]) > self._limits.max_body_bytes:
            raise self._too_long()

    def _too_long(self) -> ApiError:
        most = self._limits.max_body_bytes
        return _error(
            413,
            "body_too_large",
            f"The body is longer than {most:,} bytes (`limits.max_body_bytes`). Shorten it.",
        )

    async def _body(self, receive: Receive) -> bytes | None:
        """Read the whole body; None where the client left meanwhile."""
        chunks: list[bytes] = []
        size, deadline = 0, time.monotonic() + self._limits.body_seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise _error(
                    408,
                    "body_timeout",
                    f"The body was not there after {self._limits.body_seconds:g} seconds"
                    " (`limits.body_seconds`). Send it faster.",
                ) from None
            if message["type"] != "http.request":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._limits.max_body_bytes:
                raise self._too_long()
            if not message.get("more_body", False):
                return b"".join(chunks)

    async def _answer(
        self, scope: Scope, body: bytes, receive: Receive, send: Send, running: Running
    ) -> None:
        """Let the application answer, until it is done, its client left, or it is ended from outside."""
        reply = _Reply(send)
        gone = asyncio.ensure_future(_gone(receive, reply))
        task = asyncio.ensure_future(self._app(scope, _replayed(body, gone), reply.send))
        try:
            done, _ = await asyncio.wait(
                (task, gone, running.ended),
                timeout=self._limits.request_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if reply.has_left:
                scope["state"]["client_gone"] = True  # whatever the application may still say to nobody
                running.end("client_gone")
            elif gone in done:
                await asyncio.wait((task,), timeout=CANCEL_SECONDS)
            if task.done():
                return task.result()
            running.end("too_old")
        finally:
            gone.cancel()
            if not task.done():
                reply.is_closed = True
                task.cancel()
                await asyncio.wait((task,), timeout=CANCEL_SECONDS)
        await reply.close(running.ended.result())


async def _gone(receive: Receive, reply: _Reply) -> None:
    """Return when the client left. FastAPI would let a handler go on without one."""
    while (await receive())["type"] != "http.disconnect":
        pass
    # The same message comes when a reply is complete. Now is the time to tell: the application hears of it,
    # too, and may complete its reply yet.
    reply.has_left = not reply.is_complete


def _replayed(body: bytes, gone: asyncio.Future[None]) -> Receive:
    """Return what hands out the body that was read, and then that the client left."""
    pending = [body]

    async def replay() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        await asyncio.shield(gone)
        return {"type": "http.disconnect"}

    return replay


class _Reply:
    """What an application sends, so that it can be finished in its place.

    Attributes:
        is_closed: whether what it still sends is dropped.
        is_complete: whether all of it was sent.
        has_left: whether its client left before that.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_closed = self.has_left = False
        self.is_complete = self._is_started = self._is_stream = False

    async def send(self, message: Message) -> None:
        if self.is_closed:
            return
        if message["type"] == "http.response.start":
            self._is_started = True
            kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
            self._is_stream = any(value.startswith(b"text/event-stream") for value in kinds)
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.is_complete = True

    async def close(self, why: End) -> None:
        """Finish it for a request that was ended."""
        status, code, message = WHY[why]
        if self.is_complete:
            return
        if not self._is_started:
            await send_error(self._send, _error(status, code, message))
        elif self._is_stream:
            event = b"data: " + json_bytes(_error(status, code, message).body) + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        # Else a reply of known length is cut, which its client notices: the server closes the connection.
