"""Limits on the socket, where uvicorn has none: how long a head may take, and who never reads its answer.

Without them a client that sends a byte a minute, or takes nothing of a stream, holds its connection for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from glmtune.serving.settings import LimitSettings

WRITE_BUFFER_BYTES = 16384
"""Written and not taken by the system: from here on the stream waits for its client."""


class GuardedProtocol(H11Protocol):
    """HTTP/1.1 with the time limits of `LimitSettings`; `guarded_protocol` gives it those.

    Overrides are methods of `asyncio.Protocol`, called by its transport; of uvicorn it uses `cycle` (the
    request that is answered, None before the first) and `connections` (0.34 to 0.54).
    """

    limits: LimitSettings
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, unless there are too many; its first head is due from now on."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        if len(self.connections) > self.limits.max_connections:
            transport.abort()
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        """Read; while no request is being answered, the time of the next head runs from its first byte."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._await_head()

    def on_response_complete(self) -> None:
        """Go on with the connection; called by uvicorn when the last byte was handed to the transport."""
        super().on_response_complete()
        # A rest below the mark at which writing pauses would keep a connection open that nobody reads.
        if self.transport.get_write_buffer_size() and self._send_timer is None:
            self._send_timer = self._later(self.limits.send_seconds, self._abort_unread)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._stop_head_timer()
        self._stop_send_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """What is written waits: the client has so long to take enough of it."""
        super().pause_writing()
        self._stop_send_timer()
        self._send_timer = self._later(self.limits.send_seconds, self._abort_unread)

    def resume_writing(self) -> None:
        """The client took what waited."""
        self._stop_send_timer()
        super().resume_writing()

    def _await_head(self) -> None:
        self._head_timer = self._later(self.limits.header_seconds, self.transport.abort)

    def _later(self, seconds: float, act: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, act)

    def _abort_unread(self) -> None:
        self._send_timer = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # `close` would first write what waits, which nobody takes

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None


def guarded_protocol(limits: LimitSettings) -> type[asyncio.Protocol]:
    """Return the protocol with limits: uvicorn makes its objects, and passes no more than it knows."""
    members: dict[str, Any] = {"limits": limits}
    return type("LimitedProtocol", (GuardedProtocol,), members)
