"""Answers that are being written for a page: one or two at once, read in threads, stopped at any time.

::

    engine ──▶ AnswerStream ──▶ reader (a thread each) ──▶ AnswerParts ──▶ `Answering.changes` ──▶ the page
                    ▲
                    └── stopped by `stop`: the button, another chat, the tab closed
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Sequence

from glmtune.errors import GlmtuneError
from glmtune.inference.requests.chat import Finished
from glmtune.interactive.answerer import AnswerStream
from glmtune.interactive.conversation import AnswerParts

PAUSE_SECONDS = 0.05
"""Between two updates of a page: the eye sees no more, and each one costs the rendering of the answer."""

LEFT_SECONDS = 5.0
"""Longest wait for the end of an answer that was stopped."""

Ask = Callable[[], AnswerStream]
"""Asks for an answer; raises GlmtuneError where it is refused."""


class Answering:
    """Answers to one question of one page.

    Attributes:
        parts: what came of each so far.
        error: of the first that failed; empty: none.
        result: what the page made of the answers, for whoever stops them.
    """

    def __init__(self, asks: Sequence[Ask]) -> None:
        """Prepare; nothing is asked before `changes` is iterated."""
        self.parts = [AnswerParts() for _ in asks]
        self.error = ""
        self.result: object = None
        self._asks = list(asks)
        self._streams: list[AnswerStream] = []
        self._is_stopped = False
        self._lock = threading.Lock()
        self._running = len(asks)
        self._tell: Callable[[], None] = lambda: None
        self._over = asyncio.Event()

    async def changes(self) -> AsyncGenerator[None]:
        """Yield whenever ``parts`` grew, until all answers are over; leaving early stops them.

        Every answer is then finished, with the reason ``cancelled`` where it was stopped.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            # The loop may be gone when a server ends while answers are written.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        self._tell = tell
        for place in range(len(self._asks)):
            threading.Thread(target=self._read, args=(place,), name="glmtune-web-answer", daemon=True).start()
        try:
            while not self._is_over:
                await changed.wait()
                changed.clear()
                yield
                await asyncio.sleep(PAUSE_SECONDS)
        finally:
            self.stop()
            self._finish()

    def stop(self) -> None:
        """Cancel what is still being written, from any thread; `changes` then ends."""
        with self._lock:
            self._is_stopped = True
            streams = list(self._streams)
        for stream in streams:
            stream.stop()
        self._tell()

    def end(self) -> None:
        """Say that the page has taken the answers over."""
        self._over.set()

    async def stopped(self) -> None:
        """Stop, and wait for `end`."""
        self.stop()
        # A page that was left in the middle takes no more changes, and then nobody waits for them.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), LEFT_SECONDS)

    @property
    def _is_over(self) -> bool:
        # One that was stopped while it waited for its first token is over for the page at once.
        with self._lock:
            return self._running == 0 or self._is_stopped

    def _read(self, place: int) -> None:
        try:
            stream = self._asks[place]()
            with self._lock:
                self._streams.append(stream)
                is_stopped = self._is_stopped
            if is_stopped:
                stream.stop()
            for event in stream:
                with self._lock:
                    if self._is_stopped:
                        break  # leaving the loop cancels
                    self.parts[place].add(event)
                self._tell()
        except GlmtuneError as error:
            self._fail(str(error))
        except Exception as error:  # of a library: the page says it, the others go on
            self._fail(f"{type(error).__name__}: {error}")
        finally:
            with self._lock:
                self._running -= 1
            self._tell()

    def _fail(self, message: str) -> None:
        with self._lock:
            if not self._is_stopped:
                self.error = self.error or message

    def _finish(self) -> None:
        with self._lock:
            for part in self.parts:
                if part.finished is None:
                    part.finished = Finished("failed" if self.error else "cancelled", 0, 0, error=self.error)
                elif part.finished.reason == "failed":
                    self.error = self.error or part.finished.error


class Pages:
    """Which page (one open tab) is being answered."""

    def __init__(self) -> None:
        """Nobody is."""
        self._answering: dict[str, Answering] = {}

    def begin(self, page: str, answering: Answering) -> None:
        """Remember what is answered to a page."""
        self._answering[page] = answering

    def end(self, page: str, answering: Answering) -> None:
        """Forget it, unless another one has begun."""
        answering.end()
        if self._answering.get(page) is answering:
            del self._answering[page]

    def stop(self, page: str) -> None:
        """Stop what is answered to a page, if anything is."""
        answering = self._answering.get(page)
        if answering is not None:
            answering.stop()

    async def stopped(self, page: str) -> object:
        """Stop it, wait for its end, and return its ``result``; None if nothing was answered."""
        answering = self._answering.get(page)
        if answering is None:
            return None
        await answering.stopped()
        return answering.result

    def stop_all(self) -> None:
        """Stop everything; for the end of the server."""
        for answering in list(self._answering.values()):
            answering.stop()
