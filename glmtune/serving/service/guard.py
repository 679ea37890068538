"""Who may come in: the Host and Origin of a request, and its key.

A page of any site can make the browser of whoever looks at it send requests to 127.0.0.1. Two rules keep such
pages out. Their own name in Origin: a page of another origin is refused unless it is listed. DNS rebinding,
where that name points to 127.0.0.1 a moment later, so that Origin and Host agree: only Hosts that are ours
are answered.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from glmtune.serving.api.errors import ApiError
from glmtune.serving.service.asgi import AsgiApp, Receive, Scope, Send, header, send_error

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
OPEN = frozenset({("GET", "/"), ("HEAD", "/"), ("GET", "/health"), ("HEAD", "/health")})
"""What is answered without a key: the page is a form and nothing else, and health is for who watches."""
ADMIN = "/admin"


class Keys:
    """A set of keys of which only digests are held, so that none can show in a log or a trace."""

    def __init__(self, keys: Iterable[str]) -> None:
        """Take the keys."""
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._digests)

    def __contains__(self, given: object) -> bool:
        """Whether a key is one of these, in a time that does not depend on how much of it is right."""
        if not isinstance(given, str):
            return False
        digest = hashlib.sha256(given.encode("latin-1", "replace")).digest()
        # All are compared: leaving at the first would tell its place.
        found = [hmac.compare_digest(digest, each) for each in self._digests]
        return any(found)


@dataclass(frozen=True)
class Rules:
    """Who is let in.

    Attributes:
        hosts: names that Host may give, in lower case and without port; None: any.
        origins: origins that may differ from the Host; ``*``: any.
        checks_origin: whether Origin is looked at: on loopback, which needs no key.
        keys: of the API; empty: none is asked for.
        admin_keys: of the administrator's routes.
    """

    hosts: Collection[str] | None
    origins: Collection[str]
    checks_origin: bool
    keys: Keys
    admin_keys: Keys


class Guard:
    """Middleware: lets through what the rules allow, and answers the rest."""

    def __init__(self, app: AsgiApp, rules: Rules) -> None:
        """Stand before an application."""
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if (refusal := self._foreign(scope)) is not None:
            return await send_error(send, ApiError(refusal, status=403, code="forbidden"))
        is_open = (scope["method"], scope["path"]) in OPEN
        is_admin = scope["path"] == ADMIN or scope["path"].startswith(f"{ADMIN}/")
        keys = self._rules.admin_keys if is_admin else self._rules.keys
        if not is_open and keys and _key(scope) not in keys:
            return await _refuse_key(scope, send)
        return await self._app(scope, receive, send)

    def _foreign(self, scope: Scope) -> str | None:
        """Word why the page or the name is a foreign one; None if all is well."""
        rules, host, origin = self._rules, header(scope, "host") or "", header(scope, "origin")
        is_health = scope["path"] == "/health"  # probes use addresses of their own
        if rules.hosts is not None and not is_health and _name(host) not in rules.hosts:
            return (
                f"The Host header is `{host[:100]}`, but this server answers to"
                f" {', '.join(sorted(rules.hosts))} only. If that name is yours, start it with"
                " `access.allowed_hosts=[NAME]`."
            )
        if not rules.checks_origin or origin is None or "*" in rules.origins:
            return None
        if origin.lower() in rules.origins or _is_same(origin, host):
            return None
        return (
            f"The Origin header is `{origin[:100]}`, but pages of other origins may not use this server. If"
            " that page is yours, start it with `access.cors_origins=[ORIGIN]`."
        )


def _name(host: str) -> str:
    """Return a Host without its port, in lower case and without a final dot."""
    name, colon, port = host.rpartition(":")
    bare = name if colon and port.isdecimal() else host
    return bare.lower().removesuffix(".")


def _is_same(origin: str, host: str) -> bool:
    """Whether an origin names the host that was asked; behind a proxy the scheme may differ."""
    try:
        parts = urlsplit(origin.lower())
        standard = {"http": 80, "https": 443}.get(parts.scheme)
        port = parts.port or standard
        asked = urlsplit(f"//{host.lower()}")
        return standard is not None and parts.hostname == asked.hostname and port == (asked.port or standard)
    except ValueError:
        return False


def _key(scope: Scope) -> str | None:
    scheme, _, key = (header(scope, "authorization") or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


async def _refuse_key(scope: Scope, send: Send) -> None:
    """Answer 401, without a word of the key that was given."""
    what = "is not one of this server's" if _key(scope) else "is missing"
    message = (
        f"The API key {what}. Send one as the header `Authorization: Bearer KEY` (`api_key=` in clients)."
    )
    await send_error(send, ApiError(message, status=401, headers={"WWW-Authenticate": "Bearer"}))
