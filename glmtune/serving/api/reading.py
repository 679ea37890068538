"""Where requests are read: bodies parsed, conversations rendered and tokenized, beside the event loop.

This takes as long as a body is, so the loop that serves everybody does none of it. But Python runs one thread
at a time: forty that read (a framework's pool) leave the loop and the engine a fortieth of it each, and
`/health` waits for seconds while many clients arrive. So two threads read, each one request after the other:

    body up to SHORT_BYTES --> "glmtune-read-short" --> chat, completions, POST /
    longer                 --> "glmtune-read-long"

A book as a prompt delays other books, and no question. Who leaves while the request waits is never read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

Asked = TypeVar("Asked")

SHORT_BYTES = 32768
"""Read in a few hundredths of a second."""


class RequestReader:
    """Reads requests in threads of its own, which start with the first ones."""

    def __init__(self) -> None:
        """Start without threads."""
        self._short = ThreadPoolExecutor(1, "glmtune-read-short")
        self._long = ThreadPoolExecutor(1, "glmtune-read-long")

    async def read(self, read: Callable[[bytes], Asked], raw: bytes) -> Asked:
        """Return what a body asks.

        Args:
            read: reads it; called in another thread.
            raw: the body.

        Raises:
            ApiError: what `read` raises of it.
        """
        pool = self._short if len(raw) <= SHORT_BYTES else self._long
        return await asyncio.get_running_loop().run_in_executor(pool, partial(read, raw))
