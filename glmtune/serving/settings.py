"""Settings of the server: who may use it, how much it takes on, and what an answer is where nobody says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from glmtune.errors import ConfigError
from glmtune.settings import check_range, setting

KEYS_VARIABLE = "GLMTUNE_API_KEYS"
ADMIN_KEYS_VARIABLE = "GLMTUNE_ADMIN_KEYS"
MIN_ADMIN_KEY = 16
"""Shortest key of an administrator, in characters: who guesses it changes what everybody is answered."""


@dataclass(frozen=True)
class AccessSettings:
    """Who may use the server, and from which pages."""

    api_keys_file: str | None = setting(
        None, f"file of API keys, one a line; also from the environment: {KEYS_VARIABLE}=KEY,KEY"
    )
    cors_origins: list[str] | None = setting(
        None, "origins whose pages may use the server, such as https://chat.example.com; '*': all"
    )
    allowed_hosts: list[str] | None = setting(
        None, "names it answers to (the Host header), '*': all; default: its own on loopback, all elsewhere"
    )
    page: bool = setting(True, "serve the chat page at /")
    admin: bool = setting(False, f"adapters may be added and removed; needs keys in {ADMIN_KEYS_VARIABLE}")
    admin_keys_file: str | None = setting(
        None, f"file of the administrators' keys, instead of {ADMIN_KEYS_VARIABLE}"
    )
    adapter_dir: str | None = setting(None, "folder from which adapters may be added; nothing outside it")

    def __post_init__(self) -> None:
        """Check what needs no file, and report all problems together.

        Raises:
            ConfigError: naming each setting, its value, the rule and the way out.
        """
        problems = [
            f"`access.cors_origins` holds `{origin}`, but an origin is a scheme, a host and perhaps a port,"
            " such as https://chat.example.com or http://localhost:3000. Leave out what follows."
            for origin in self.cors_origins or ()
            if origin != "*" and not _is_origin(origin)
        ]
        problems += [
            f"`access.allowed_hosts` holds `{host}`, but a host is a name or an address without scheme, path"
            " and port, such as chat.example.com or [::1]."
            for host in self.allowed_hosts or ()
            if host != "*" and not re.fullmatch(r"[\w.-]+|\[[0-9A-Fa-f:.]+\]", host)
        ]
        if self.admin and self.adapter_dir is None:
            problems.append(
                "`access.admin` is True, but nothing says where adapters may lie. Add"
                " `access.adapter_dir=FOLDER`."
            )
        for name in ("adapter_dir", "admin_keys_file"):
            if not self.admin and getattr(self, name) is not None:
                problems.append(
                    f"`access.{name}` is `{getattr(self, name)}`, but adapters cannot be added. Add"
                    f" `access.admin=true`, or leave `access.{name}` out."
                )
        if problems:
            raise ConfigError("\n".join(problems))


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        return False
    is_bare = not (parts.path or parts.query or parts.fragment or parts.username)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and is_bare


@dataclass(frozen=True)
class LimitSettings:
    """How much the server takes on, and how long it waits."""

    max_requests: int = setting(
        256, "most requests that are answered or wait at once; more are refused (429)"
    )
    max_connections: int = setting(1024, "most connections held at once; more are closed at once")
    max_body_bytes: int = setting(8 * 2**20, "longest body of a request, in bytes")
    header_seconds: float = setting(10.0, "longest time until the head of a request is there")
    body_seconds: float = setting(30.0, "longest time until the body of a request is there")
    send_seconds: float = setting(30.0, "a client that takes nothing of its answer for so long is dropped")
    request_seconds: float = setting(600.0, "longest time of a request, waiting included")
    keep_alive_seconds: int = setting(65, "an idle connection is closed after so long")
    drain_seconds: float = setting(30.0, "after SIGTERM running requests may go on for so long")

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a number out of range.
        """
        check_range("limits.max_requests", self.max_requests, low=1)
        check_range("limits.max_connections", self.max_connections, low=1)
        check_range("limits.max_body_bytes", self.max_body_bytes, low=1024, high=2**30)
        check_range("limits.keep_alive_seconds", self.keep_alive_seconds, low=1, high=3600)
        check_range("limits.drain_seconds", self.drain_seconds, low=0, high=86400)
        for name in ("header_seconds", "body_seconds", "send_seconds", "request_seconds"):
            check_range(f"limits.{name}", getattr(self, name), low=0.1, high=86400)


@dataclass(frozen=True)
class AnswerSettings:
    """What an answer is where a request says nothing, and what of it is written down."""

    default_model: str | None = setting(
        None, "answers where a request names no model (as `POST /`); default: the one adapter, else the base"
    )
    max_tokens: int | None = setting(
        None, "most tokens of an answer where a request names no number; default: what the context leaves"
    )
    strict: bool = setting(False, "refuse fields that are not known, instead of naming them in a header")
    log_contents: bool = setting(False, "log what is asked and answered, too")

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: no room for a token.
        """
        if self.max_tokens is not None:
            check_range("answers.max_tokens", self.max_tokens, low=1)
