"""The address of a server: where requests go, what goes with them, and what may be shown and kept of it.

A key may stand in an environment variable, or in the address itself (``user:password@``, ``?key=...``). It
is sent to the host named and nowhere else, and no message, log or file shows it.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import urllib.request
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from glmtune.errors import ConfigError

DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_SHOWN = 300
HIDDEN = "***"
EXAMPLE = "Give the address of the server, such as http://localhost:8000/v1"


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server is.

    Attributes:
        scheme: ``http`` or ``https``.
        host: name or number, in small letters.
        port: the scheme's own where none was given.
        path: as given, without a slash at its end.
        query: what was behind the ``?``; goes with every request.
        headers: with the key.
        secrets: texts that nobody may see.
    """

    scheme: str
    host: str
    port: int
    path: str
    query: str = field(default="", repr=False)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def origin(self) -> str:
        """Scheme, host and port, the latter where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + ("" if self._has_own_port else f":{self.port}")

    @property
    def shown(self) -> str:
        """The address without user, password and query: the same text for the same server."""
        return self.origin + self.path

    @property
    def _has_own_port(self) -> bool:
        return self.port == DEFAULT_PORTS[self.scheme]

    def url(self, path: str) -> str:
        """Return the whole address of one kind of request."""
        return f"{self.shown}/{path}" + (f"?{self.query}" if self.query else "")

    def has_origin(self, scheme: str, host: str, port: int | None) -> bool:
        """Say whether an address is that of this server."""
        known = (self.scheme, self.host, self.port)
        return (scheme, host.lower(), port or DEFAULT_PORTS.get(scheme)) == known

    def without_secrets(self, text: str) -> str:
        """Return a text with every secret in it made unreadable (servers repeat keys that they refuse)."""
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        return text


def read_address(
    base_url: str, *, api_key_env: str = "", setting: str = "endpoint.base_url", key_setting: str = ""
) -> ServerAddress:
    """Take an address apart; no message shows what may be secret in it.

    Args:
        base_url: as the user gave it.
        api_key_env: environment variable that holds the key, sent as bearer token where the address has no
            user of its own.
        setting: what the address is called, for messages.
        key_setting: the setting that names the variable, if there is one, for messages.

    Raises:
        ConfigError: it is no address, or the key is none.
    """
    given = base_url.strip()
    try:
        parts = urlsplit(given)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    # Behind an unescaped `/`, `?` or `#` the rest of a password would pass for a path.
    is_whole = "@" not in parts.path + parts.query + parts.fragment
    if parts.scheme not in DEFAULT_PORTS or not host or not is_whole or not _is_plain(given):
        safe = f" is `{shown(given)}`, but it" if "@" not in given and "?" not in given else ""
        raise ConfigError(
            f"`{setting}`{safe} must start with http:// or https://, followed by a host. {EXAMPLE}"
            " (in a user name or password `/`, `?`, `#` and `@` are written %2F, %3F, %23 and %40)."
        )
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    key = os.environ.get(api_key_env, "").strip() if api_key_env else ""
    if not _is_plain(key):
        named = f" (`{key_setting}`)" if key_setting else ""
        raise ConfigError(
            f"The key in the environment variable `{api_key_env}`{named} holds blanks, line"
            " breaks or letters outside ASCII, which no key has. Set it again."
        )
    headers: dict[str, str] = {}
    if user or password:
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {token}"
    elif key:
        headers["Authorization"] = f"Bearer {key}"
    values = [value for _, value in parse_qsl(parts.query, keep_blank_values=True)]
    raw = [value.partition("=")[2] for value in parts.query.split("&")]
    found = {key, password, parts.password or "", headers.get("Authorization", "").rpartition(" ")[2]}
    # As decoded and as written in the address; the longest first, as one may be a part of another. What has
    # two letters is no secret, and hiding it would make words unreadable.
    secrets = sorted({text for text in (*found, *values, *raw) if len(text) > 2}, key=len, reverse=True)
    return ServerAddress(
        parts.scheme,
        host.lower(),
        port or DEFAULT_PORTS[parts.scheme],
        parts.path.rstrip("/"),
        parts.query,
        headers,
        tuple(secrets),
    )


def _is_plain(text: str) -> bool:
    return re.fullmatch(r"[!-~]*", text) is not None


def environment_proxy(address: ServerAddress) -> str | None:
    """Return the proxy that the environment names for a server, None to ask it directly.

    This machine is never asked through a proxy. Over https:// a proxy passes on what it cannot read; over
    http:// it would read the key, which is for the server alone.

    Args:
        address: of the server.

    Raises:
        ConfigError: a proxy would read the key, or is of a kind that cannot be used.
    """
    if _is_this_machine(address.host) or urllib.request.proxy_bypass(f"{address.host}:{address.port}"):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if not proxy:
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    place = shown(re.sub(r"//.*@", "//", proxy))
    way_out = f"Add `{address.host}` to the environment variable NO_PROXY to ask the server directly"
    if not proxy.startswith(("http://", "https://")):
        raise ConfigError(
            f"The environment names the proxy `{place}`, but only http:// ones are used. {way_out}."
        )
    if address.scheme == "http" and (address.headers or address.query):
        raise ConfigError(
            f"The environment names the proxy `{place}`, which would read the key meant for {address.origin}"
            f" alone. {way_out}, or ask it over https://."
        )
    return proxy


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def shown(text: str) -> str:
    """Return foreign text fit for a terminal: one line, no control characters, at most `MAX_SHOWN` long."""
    words = " ".join(text[: 4 * MAX_SHOWN].split())
    plain = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in words)
    return plain if len(plain) <= MAX_SHOWN else f"{plain[:MAX_SHOWN]}…"
