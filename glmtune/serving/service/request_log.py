"""The record of a request: its id, its line in the log, its place in the metrics.

Contents are never part of it unless `answers.log_contents` asks for them; keys, headers and query strings
never are.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

from glmtune.serving.api.errors import ApiError
from glmtune.serving.api.state import AnsweredRequest
from glmtune.serving.service.asgi import AsgiApp, Message, Receive, Scope, Send, header, send_error
from glmtune.serving.service.gate import CLIENT_GONE
from glmtune.serving.service.metrics import Metrics
from glmtune.terminal.text import write_error

LOGGER = logging.getLogger("glmtune.serving")
ROUTES = frozenset(
    (
        "/",
        "/health",
        "/metrics",
        "/openapi.json",
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/admin/adapters",
    )
)
"""Routes that the metrics tell apart. What is asked for is anybody's choice and would grow without end."""
METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS"})
PROBES = frozenset({"/health", "/metrics"})
"""Counted, but written down only where they are refused."""
KEPT_BYTES = 65536
"""Most of a body that is written down, where contents are logged."""


@dataclass
class Record:
    """What is known of a request.

    Attributes:
        request_id: the client's own (X-Request-ID), or a new one.
        begin: of its head, as `time.perf_counter` counts.
        status: of the reply; None before there is one.
        answered: what the engine did for it, if it came so far.
        contents: body and reply as far as they are written down.
    """

    request_id: str
    begin: float = field(default_factory=time.perf_counter)
    status: int | None = None
    answered: AnsweredRequest | None = None
    contents: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))


RECORD: ContextVar[Record | None] = ContextVar("glmtune_request", default=None)
"""The record of the request in whose context code runs; a thread that asyncio starts for it has it, too."""


def note_answered(answered: AnsweredRequest) -> None:
    """Add what the engine did to the record of the request in whose context this is called."""
    if (record := RECORD.get()) is not None:
        record.answered = answered


class RequestLog:
    """Middleware, the outermost one: sees every request and what became of it."""

    def __init__(self, app: AsgiApp, metrics: Metrics, *, logs_contents: bool) -> None:
        """Stand before an application."""
        self._app, self._metrics, self._logs_contents = app, metrics, logs_contents

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, and write down what came of it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        record = Record(_request_id(scope))
        scope.setdefault("state", {})["request_id"] = record.request_id
        RECORD.set(record)
        is_over = False

        async def watched_send(message: Message) -> None:
            nonlocal is_over
            if message["type"] == "http.response.start":
                record.status = message["status"]
                named = (b"x-request-id", record.request_id.encode("latin-1"))
                message = {**message, "headers": [*message.get("headers", ()), named]}
            elif self._logs_contents:
                _keep(record.contents[1], message.get("body", b""))
            await send(message)
            is_over = message["type"] == "http.response.body" and not message.get("more_body", False)

        async def watched_receive() -> Message:
            message = await receive()
            if self._logs_contents:
                _keep(record.contents[0], message.get("body", b""))
            return message

        try:
            await self._app(scope, watched_receive, watched_send)
        except Exception:
            LOGGER.exception("request %s failed", record.request_id)
            if record.status is None:
                why = f"The server failed; its log says why under {record.request_id}."
                await send_error(watched_send, ApiError(why, status=500, code="internal_error"))
        finally:
            # A reply that broke off: its client left, or the connection was dropped for it.
            is_whole = is_over and not scope["state"].get("client_gone")
            self._write(scope, record, record.status if is_whole and record.status else CLIENT_GONE)

    def _write(self, scope: Scope, record: Record, status: int) -> None:
        seconds = time.perf_counter() - record.begin
        route = scope["path"] if scope["path"] in ROUTES else "other"
        if scope["path"].startswith("/admin/adapters/"):
            route = "/admin/adapters"
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        if route in PROBES and status in (200, 503):
            return  # every few seconds, by whoever watches: they would bury the rest
        words = f"{scope['method'][:20]} {_path(scope)} {status}"
        if (answered := record.answered) is not None:
            words += f" {answered.num_prompt_tokens}+{answered.num_new_tokens} tokens"
            if answered.first_seconds is not None:
                words += f", first after {answered.first_seconds:.3f} s"
        LOGGER.info("%s, %.3f s, id %s", words, seconds, record.request_id)
        for name, kept in zip(("asked", "answered"), record.contents, strict=True):
            if kept:
                LOGGER.info("%s %s: %s", record.request_id, name, _one_line(kept))


def _request_id(scope: Scope) -> str:
    """Return the client's own id where it is one that may stand in a log and a header, else a new one."""
    given = header(scope, "x-request-id")
    return given if given and re.fullmatch(r"[\w.:/+=@-]{1,128}", given, re.ASCII) else uuid.uuid4().hex


def _path(scope: Scope) -> str:
    """Return the path as it was sent, percent signs and all: a decoded one may hold line ends."""
    return scope.get("raw_path", b"").decode("latin-1")[:200]


def _keep(kept: bytearray, body: bytes) -> None:
    kept += body[: max(0, KEPT_BYTES - len(kept))]


def _one_line(kept: bytearray) -> str:
    return kept.decode("utf-8", "replace").replace("\n", "\\n").replace("\t", "\\t")


class _TerminalHandler(logging.Handler):
    """Writes lines by the one way to the terminal, which shows control characters instead of sending them."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            write_error(self.format(record) + "\n")
        except (OSError, ValueError):  # the terminal was closed: no reason to end a request
            self.handleError(record)


def start_logging() -> None:
    """Let the server's lines, and uvicorn's warnings, go to the terminal."""
    handler = _TerminalHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name, level in (("glmtune.serving", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level)
