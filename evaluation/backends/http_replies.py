"""What an answer over HTTP holds: read within limits, and what is said in it of a failure.

A server may be broken, of another kind, or hostile: it may send without end, zeros packed small, brackets
nested without end, or numbers of a million digits. All of it is refused with the limit named.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from glmtune.errors import GlmtuneError

LONGEST_WAIT_SECONDS = 60.0
MAX_REPLY_BYTES = 8 * 2**20
"""Of one answer, unpacked; the longest completion with its log-probabilities stays below a tenth of it."""


class RefusedError(GlmtuneError):
    """One request was not answered, and the next one may be."""


class MalformedError(RefusedError):
    """An answer has not the form that it should have."""


class NotServedError(GlmtuneError):
    """A server that answers has not what was asked for."""


class Problem(Exception):
    """What came of one attempt instead of an answer.

    Attributes:
        text: in words, fit for a terminal.
        retries: further attempts that it is worth.
        is_general: it would meet every other request as well.
        asked_wait: seconds the server asks to wait; 0 if it does not say.
        hint: what the user may do.
        status: of HTTP; 0 where no server answered.
    """

    def __init__(
        self,
        text: str,
        *,
        retries: int = 0,
        is_general: bool = False,
        asked_wait: float = 0.0,
        hint: str = "",
        status: int = 0,
    ) -> None:
        super().__init__(text)
        self.text, self.retries, self.is_general = text, retries, is_general
        self.asked_wait, self.hint, self.status = asked_wait, hint, status


async def read_body(reply: httpx2.Response) -> bytes:
    """Read an answer as far as `MAX_REPLY_BYTES`: a server may send without end, or zeros packed small."""
    data = bytearray()
    chunks: AsyncGenerator[bytes] = reply.aiter_bytes()
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            data += chunk
            if len(data) > MAX_REPLY_BYTES:
                raise Problem(f"its answer is longer than {MAX_REPLY_BYTES:,} bytes, the limit")
    return bytes(data)


def status_inside(content: Any) -> int:
    """Return the status that gateways hide in an answer under 200: 200 if there is no error in it.

    An error that names no status of its own counts as one of this request (400).
    """
    if not isinstance(content, dict):
        return 200
    error = content.get("error") or (content if content.get("object") == "error" else None)
    if not error:
        return 200
    code = error.get("code") if isinstance(error, dict) else None
    try:
        number = int(str(code))
    except ValueError:
        return 400
    return number if 400 <= number < 600 else 400


def seconds_asked(retry_after: str | None, date: str | None) -> float:
    """Return the seconds of a ``Retry-After``: a number, or a date (by the server's clock where it says)."""
    text = (retry_after or "").strip()
    with contextlib.suppress(ValueError, OverflowError):
        return min(max(float(text), 0.0), LONGEST_WAIT_SECONDS)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        until = parsedate_to_datetime(text).timestamp()
        now = time.time()
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            now = parsedate_to_datetime(date or "").timestamp()
        return min(max(until - now, 0.0), LONGEST_WAIT_SECONDS)
    return 0.0
