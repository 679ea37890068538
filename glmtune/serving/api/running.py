"""A request that runs: its answers' events on their way from the engine's thread into the event loop.

    engine's thread                          event loop
    on_event(event) -> deque, wake once ---> batches(): all that came meanwhile, neighbours joined -> reply
    cancel()        <----------------------- the client went away, the reply broke off, its task was cancelled

The engine never waits for a client, and a client that does not read leaves at most the text of its answers
here: what came while a chunk was being sent is joined to one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol

from starlette.types import Receive

from glmtune.inference.requests.chat import (
    AnswerEvent,
    CallDelta,
    CallStart,
    Finished,
    TextDelta,
    ThoughtDelta,
)
from glmtune.serving.api.errors import ApiError
from glmtune.serving.api.state import AnsweredRequest

Batch = list[tuple[int, AnswerEvent]]
"""Events by the index of their answer."""


class Cancellable(Protocol):
    """What was handed to the engine."""

    def cancel(self) -> None:
        """Ask the engine to stop."""
        ...


class ClientGoneError(Exception):
    """Nobody reads the reply any more."""


class RunningRequest:
    """The answers to one request; made and used in the event loop."""

    def __init__(
        self,
        *,
        path: str,
        model: str,
        is_stream: bool,
        ends_at_first_call: bool = False,
        on_answered: Callable[[AnsweredRequest], None] | None = None,
    ) -> None:
        """Start without answers.

        Args:
            path: the route.
            model: the name asked for.
            is_stream: whether the reply is streamed.
            ends_at_first_call: an answer ends where its second tool call would begin.
            on_answered: told what became of the request.
        """
        self._path, self._model, self._is_stream = path, model, is_stream
        self._ends_at_first_call, self._on_answered = ends_at_first_call, on_answered
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._is_notified = False
        self._queue: deque[tuple[int, Any]] = deque()
        self._answers: list[Cancellable] = []
        self._events_of: list[Callable[[Any], Iterable[AnswerEvent]]] = []
        self._finished: dict[int, Finished] = {}
        self._cut: set[int] = set()
        self._is_gone = False
        self._started, self._first_seconds = time.monotonic(), None

    def add(
        self,
        submit: Callable[[Callable[[Any], None]], Cancellable],
        events_of: Callable[[Any], Iterable[AnswerEvent]] | None = None,
    ) -> None:
        """Hand one answer to the engine; where that fails, those before it are cancelled.

        Args:
            submit: gets the function that takes what comes, called in the engine's thread.
            events_of: turns what comes into events, called in the event loop; None: it is events.

        Raises:
            GlmtuneError: the engine refuses it.
        """
        index = len(self._answers)
        try:
            answer = submit(lambda item: self._put(index, item))
        except BaseException:
            self.cancel()
            raise
        self._answers.append(answer)
        self._events_of.append(events_of or (lambda event: (event,)))

    def cancel(self) -> None:
        """Ask the engine to stop all answers that have not ended."""
        for index, answer in enumerate(self._answers):
            if index not in self._finished:
                answer.cancel()

    @asynccontextmanager
    async def watched(self, receive: Receive) -> AsyncGenerator[None]:
        """Watch the client while the reply is made; however that ends, what still runs is cancelled.

        Args:
            receive: of the request, whose body was read: what comes next is that the client went away.
        """
        watch = asyncio.create_task(self._watch(receive))
        try:
            yield
        finally:
            watch.cancel()
            self.cancel()
            self._report()

    async def batches(self, *, keep_alive_seconds: float | None = None) -> AsyncGenerator[Batch]:
        """Yield events as they come until every answer has ended; only while `watched`.

        Args:
            keep_alive_seconds: an empty batch says that nothing came for so long; None: say nothing.

        Raises:
            ClientGoneError: the client went away.
            ApiError: an answer failed.
        """
        while len(self._finished) < len(self._answers):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(keep_alive_seconds):
                    await self._wake.wait()
            self._wake.clear()
            if self._is_gone:
                raise ClientGoneError
            yield self._take()

    def _put(self, index: int, item: object) -> None:
        """Take what the engine hands over, in its thread."""
        self._queue.append((index, item))
        # One call into the loop for all that comes until it looks: each costs a system call.
        if not self._is_notified:
            self._is_notified = True
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
                self._loop.call_soon_threadsafe(self._wake.set)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        # At once, not when the reply notices: it may be waiting to send.
        self._is_gone = True
        self.cancel()
        self._wake.set()

    def _take(self) -> Batch:
        self._is_notified = False  # first: what comes from now on wakes anew
        batch: Batch = []
        last: dict[int, int] = {}
        while self._queue:
            index, item = self._queue.popleft()
            for event in self._events_of[index](item):
                kept = self._kept(index, event)
                if kept is None:
                    continue
                before = batch[last[index]][1] if index in last else None
                if (joined := _joined(before, kept)) is not None:
                    batch[last[index]] = (index, joined)
                else:
                    last[index] = len(batch)
                    batch.append((index, kept))
        if batch and self._first_seconds is None:
            self._first_seconds = time.monotonic() - self._started
        return batch

    def _kept(self, index: int, event: AnswerEvent) -> AnswerEvent | None:
        """Return an event as the reply shows it; remember ends."""
        if isinstance(event, CallStart) and event.index and self._ends_at_first_call:
            self._cut.add(index)
            self._answers[index].cancel()
        if not isinstance(event, Finished):
            return None if index in self._cut else event
        if index in self._cut:
            event = replace(event, reason="tool_calls")
        self._finished[index] = event
        if event.reason == "failed":
            message = event.error or "The answer failed. The server's log says more."
            raise ApiError(message, status=500, code="engine_error")
        if event.reason == "cancelled":
            raise ApiError("The answer was stopped: the server ends.", status=503, code="stopping")
        return event

    def _report(self) -> None:
        if self._on_answered is None:
            return
        ended = [self._finished.get(index) for index in range(len(self._answers))]
        known = [each for each in ended if each is not None]
        self._on_answered(
            AnsweredRequest(
                path=self._path,
                model=self._model,
                is_stream=self._is_stream,
                num_choices=len(ended),
                num_prompt_tokens=sum(each.num_prompt_tokens for each in known),
                num_cached_tokens=sum(each.num_cached_tokens for each in known),
                num_new_tokens=sum(each.num_new_tokens for each in known),
                finish_reasons=tuple("cancelled" if each is None else each.reason for each in ended),
                first_seconds=self._first_seconds,
                seconds=time.monotonic() - self._started,
            )
        )


def _joined(before: AnswerEvent | None, event: AnswerEvent) -> AnswerEvent | None:
    """Return two neighbours of an answer as one event; None where they cannot be one."""
    match before, event:
        case TextDelta(), TextDelta():
            return TextDelta(before.text + event.text, before.logprobs + event.logprobs)
        case ThoughtDelta(), ThoughtDelta():
            return ThoughtDelta(before.thoughts + event.thoughts, before.logprobs + event.logprobs)
        case CallDelta(), CallDelta() if before.index == event.index:
            return CallDelta(
                event.index, before.arguments + event.arguments, before.logprobs + event.logprobs
            )
        case _:
            return None
