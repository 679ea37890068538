"""What stands in front of the page: who may ask for what, and what a browser may do with it.

Gradio serves far more than a chat needs: uploads, files of the machine, a proxy, its API and editors for
developers. Only the paths that the page itself asks for are let through; all else is not found. The page is
sent with a policy that lets a browser load from nowhere else and run no script that is not the page's own.
`_EventStreams` keeps in order what would otherwise now and then lose a question.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from glmtune.interactive.web.words import LANGUAGES

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 16 * 2**20
"""Of what a page sends: a chat of a very long context is a few MiB."""
PAGES = frozenset(f"/{words.path}" for words in LANGUAGES.values())
STREAM, JOIN = "/gradio_api/queue/data", "/gradio_api/queue/join"
LEFT_SECONDS = 5.0
"""Longest wait for a page to leave a stream of events that has ended."""
_CLOSED = b'data: {"msg":"close_stream"'
# The page names its session last; what it sends before, such as a chat, escapes its quotes.
_SESSION = re.compile(rb'"session_hash":\s*"(\w+)"')
SESSION_BYTES = 400
_GET = re.compile(
    r"/(config|theme\.css|favicon\.ico|robots\.txt|logout|login_check"
    r"|(assets|static)/[^\\]+"
    r"|gradio_api/(theme\.css|startup-events|login_check|queue/data|heartbeat/\w+))/?"
)
_POST = re.compile(r"/(login|gradio_api/(queue/join|cancel|reset))/?")
_SCRIPT = re.compile(rb"<script(?=[\s>])")
_FOREIGN_META = re.compile(rb'<meta[^>]*content="https?://[^>]*>')
# Scripts of the page compile small functions, hence unsafe-eval; a text has no way to them.
POLICY = (
    "default-src 'self'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; media-src 'none';"
    " object-src 'none'; frame-src 'none'; worker-src 'none'; base-uri 'self'; form-action 'self';"
    " frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class Guard:
    """An ASGI application that lets through to another what the page needs."""

    def __init__(self, app: ASGIApp, *, allowed_hosts: Iterable[str] | None, language: str) -> None:
        """Take the application.

        Args:
            app: serves the page.
            allowed_hosts: names in the Host header that are answered; None: all. On loopback a page of
                another site could otherwise reach us by a name of its own that points here (DNS rebinding).
            language: of the page at ``/``: ``auto`` or a code.
        """
        self._app, self._language = app, language
        self._streams = _EventStreams(app)
        self._hosts = None if allowed_hosts is None else frozenset(host.lower() for host in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no websockets here
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _reply(send, *refusal)
            return
        # Proxies are served by the Host they pass on; what else they claim is for whoever trusts them.
        if scope["path"] in PAGES and scope["method"] == "GET":
            other = self._redirect(scope, headers)
            if other is not None:
                await _reply(
                    send, 307, "", {"location": other, "vary": "accept-language", "cache-control": "no-store"}
                )
                return
            await self._app(_without_compression(scope), receive, _PageSender(send))
            return
        serve = {STREAM: self._streams.stream, JOIN: self._streams.join}.get(
            scope["path"].rstrip("/"), self._app
        )
        await serve(scope, _limited(receive), _with_headers(send, HEADERS))

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        method, path = scope["method"], scope["path"]
        host = headers.get("host", "")
        if self._hosts is not None and _host_name(host) not in self._hosts:
            return 421, f"This page is not served under the name `{host[:80]}`; see `allowed_hosts`."
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "This page answers requests of its own origin only."
        is_known = (
            path in PAGES or _GET.fullmatch(path)
            if method in ("GET", "HEAD")
            else method == "POST" and _POST.fullmatch(path)
        )
        if not is_known or ".." in path.split("/"):
            return 404, "Not found."
        if path in PAGES and b"deep_link" in scope.get("query_string", b""):
            return 404, "Not found."
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return 413, f"The body is larger than {MAX_BODY_BYTES >> 20} MiB."
        return None

    def _redirect(self, scope: Scope, headers: dict[str, str]) -> str | None:
        """Return where the page in the reader's language lies, if not here."""
        if scope["path"] != "/" or b"lang=" in scope.get("query_string", b""):
            return None
        wanted = self._language
        if wanted == "auto":
            wanted = preferred_language(headers.get("accept-language", ""))
        path = LANGUAGES[wanted].path
        return f"{scope.get('root_path', '')}/{path}" if path else None


def preferred_language(accepted: str) -> str:
    """Return which of our languages a browser's Accept-Language names first; English if none.

    >>> preferred_language("fr, zh-CN;q=0.8, en;q=0.5")
    'zh'
    """
    weighted: list[tuple[float, int, str]] = []
    for place, item in enumerate(accepted.split(",")[:20]):
        tag, _, parameter = item.strip().partition(";")
        try:
            weight = float(parameter.strip().removeprefix("q=") or 1)
        except ValueError:
            weight = 0.0
        weighted.append((-weight, place, tag.strip().partition("-")[0].lower()))
    return next((tag for _, _, tag in sorted(weighted) if tag in LANGUAGES), "en")


def _host_name(host: str) -> str:
    """Return the Host header's name without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def _without_compression(scope: Scope) -> Scope:
    """Return the scope of a request whose answer comes as plain bytes, as the page is changed on its way."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
    return {**scope, "headers": headers}


def _limited(receive: Receive) -> Receive:
    """Count the body, as a chunked one names no length."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        return {"type": "http.disconnect"} if received > MAX_BODY_BYTES else message

    return limited


def _with_headers(send: Send, headers: dict[str, str]) -> Send:
    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            added = [(name.encode(), value.encode()) for name, value in headers.items()]
            # Nobody else's page may read us, whatever the application would allow.
            kept = [(n, v) for n, v in message["headers"] if not n.lower().startswith(b"access-control-")]
            message = {**message, "headers": [*kept, *added]}
        await send(message)

    return sender


class _EventStreams:
    """Tells a page that an event is accepted only when the page will listen to what comes of it.

    A page learns by one stream what comes of all its events. When nothing is left to tell, Gradio says
    ``close_stream`` in it and ends it; the page opens another with its next event. Where that event is
    accepted while ``close_stream`` is still on its way, the page takes the old stream for open, opens none,
    and shows nothing of what comes (Gradio 6.31)::

        page                      server
         │ ◀──── close_stream ──┐   │      nothing is left to tell
         │ ───── join ──────────┼─▶ │
         │ ◀──── accepted ──────┼── │      the old stream still counts as open: no new one is opened
         │ ◀────────────────────┘   │      closed: nobody listens

    A page that has read ``close_stream`` aborts the stream. So the stream is held open here until it does,
    and what is accepted meanwhile waits for that.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._left: dict[str, asyncio.Event] = {}  # by session: streams that have ended, pages still reading

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a stream, and after its last message wait until the page leaves."""
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        session = query.get("session_hash", [""])[0]
        left: asyncio.Event | None = None

        async def sender(message: Message) -> None:
            nonlocal left
            if message.get("body", b"").startswith(_CLOSED):
                # Before anything is awaited: a join that comes now must find it.
                left = self._left[session] = asyncio.Event()
            if left is not None and not message.get("more_body"):
                message = {**message, "more_body": True}
            await send(message)

        try:
            await self._app(_without_compression(scope), receive, sender)
            if left is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(_disconnected(receive), LEFT_SECONDS)
                await send({"type": "http.response.body", "body": b""})
        finally:
            if left is not None:
                left.set()
                if self._left.get(session) is left:
                    del self._left[session]

    async def join(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take an event; say so when no stream of its page is about to be closed."""
        end = b""

        async def receiver() -> Message:
            nonlocal end
            message = await receive()
            end = (end + message.get("body", b""))[-SESSION_BYTES:]
            return message

        async def sender(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = _SESSION.findall(end)
                left = self._left.get(named[-1].decode()) if named else None
                if left is not None:
                    await left.wait()
            await send(message)

        await self._app(scope, receiver, sender)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _PageSender:
    """Sends a page with its policy: every script of it bears a number that no text can know."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message = {}
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        nonce = secrets.token_urlsafe(18)
        body = _SCRIPT.sub(f'<script nonce="{nonce}"'.encode(), _FOREIGN_META.sub(b"", self._body))
        headers = [(n, v) for n, v in self._start["headers"] if n.lower() != b"content-length"]
        headers += [
            (b"content-length", str(len(body)).encode()),
            (b"content-security-policy", POLICY.format(nonce=nonce).encode()),
            (b"cache-control", b"no-store"),
            (b"vary", b"accept-language"),
        ]
        send = _with_headers(self._send, HEADERS)
        await send({**self._start, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def _reply(send: Send, status: int, text: str, headers: dict[str, str] | None = None) -> None:
    content = {"content-type": "text/plain; charset=utf-8"} | HEADERS | (headers or {})
    start = [(name.encode(), value.encode("latin-1")) for name, value in content.items()]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": text.encode()})
