"""Who may log in: users and passwords from a file or the environment, compared in constant time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from glmtune.errors import ConfigError
from glmtune.interactive.web.settings import USERS_VARIABLE

FAILURE_SECONDS = 1.0
"""Each wrong password waits so long, one after the other: guessing a few thousand takes an hour."""


class Login:
    """Checks passwords; holds digests of them only."""

    def __init__(self, passwords: Mapping[str, str]) -> None:
        """Take the passwords by user."""
        self._key = secrets.token_bytes(32)
        self._digests = {user: self._digest(password) for user, password in passwords.items()}
        self._failures = asyncio.Lock()

    async def check(self, user: str, password: str) -> bool:
        """Whether this is a user's password; as slow for an unknown user as for a wrong password."""
        known = self._digests.get(user, b"")
        # Compared for unknown users as well, so that time tells nothing about which users there are.
        is_right = hmac.compare_digest(known or b"\0" * 32, self._digest(password)) and bool(known)
        if not is_right:
            async with self._failures:
                await asyncio.sleep(FAILURE_SECONDS)
        return is_right

    def _digest(self, password: str) -> bytes:
        # Keyed, not stretched: it lives in this process's memory only, beside the file it came from.
        return hmac.new(self._key, password.encode(), hashlib.sha256).digest()


def read_login(path: str | None) -> Login | None:
    """Read who may log in; None where neither a file nor the environment names anybody.

    Args:
        path: file with a USER:PASSWORD a line; empty lines and those beginning with ``#`` are skipped.

    Raises:
        ConfigError: the file cannot be read, or a line is none; its content is not shown.
    """
    if path is not None:
        file = Path(path).expanduser()
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
            raise ConfigError(f"`users` is `{file}`, which cannot be read: {reason}.") from None
        place = f"`users`, {file}, line"
    else:
        lines = os.environ.get(USERS_VARIABLE, "").split(",")
        place = f"{USERS_VARIABLE}, entry"
    passwords: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        user, separator, password = entry.partition(":")
        if not separator or not user.strip() or not password:
            raise ConfigError(f"{place} {number} must be `USER:PASSWORD`; it is not shown here.")
        passwords[user.strip()] = password
    if path is not None and not passwords:
        raise ConfigError(f"`users` is `{path}`, which names nobody. Write a line `USER:PASSWORD`.")
    return Login(passwords) if passwords else None
