"""The process that serves: it listens at once, loads in the background, and drains before it ends.

Only the main thread is told of signals, so the event loop runs there; the model is loaded in a thread, and so
does its engine run. The first SIGTERM, SIGHUP or Ctrl-C lets no request in any more and waits for those that
run; at the limit, or at the second signal, these are ended with an error event. The exit code is 0: it was
asked to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any

import uvicorn

from glmtune.inference.requests.chat import ChatEngine
from glmtune.serving.api.state import ServingState
from glmtune.serving.app import ServedApp
from glmtune.serving.service.connections import guarded_protocol
from glmtune.serving.settings import LimitSettings
from glmtune.signals import handled_by, leave_closed_terminal
from glmtune.terminal.text import flush_output, write_error

TICK_SECONDS = 0.05
LAST_SECONDS = 3.0
"""Time for what is left once every request was ended: closing connections, the engine's step."""
HEAD_BYTES = 32768
"""Longest head of a request."""


def run_server(
    app: ServedApp,
    state: ServingState,
    sockets: list[socket.socket],
    *,
    limits: LimitSettings,
    load: Callable[[], ChatEngine],
    on_listening: Callable[[], None],
    on_ready: Callable[[ChatEngine], None],
) -> None:
    """Serve until a signal ends it; to be called in the main thread.

    Args:
        app: what answers.
        state: told when the model is there, and when the end begins.
        sockets: listening ones.
        limits: of time, above all.
        load: loads the model, in a thread.
        on_listening: called when /health is answered, and signals end the server in order.
        on_ready: called when requests are taken.

    Raises:
        GlmtuneError: the model cannot be loaded; nobody is left waiting for a server without one.
    """
    config = uvicorn.Config(
        app.asgi,
        http=guarded_protocol(limits),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=limits.keep_alive_seconds,
        timeout_graceful_shutdown=int(LAST_SECONDS),
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
    server = _Server(config, app, state, limits)
    loading = _Loading(load)
    try:
        asyncio.run(_serve(server, loading, sockets, on_listening, on_ready))
    finally:
        if state.chat is not None:
            engine: Any = state.chat.engine
            engine.stop(timeout=LAST_SECONDS)
    if loading.error is not None:
        raise loading.error
    if loading.is_alive() or server.num_signals > 1:
        # Python takes seconds to take large libraries apart, and may crash where a thread is inside one.
        _leave()


class _Loading(threading.Thread):
    """Loads the model and starts its engine.

    Attributes:
        chat: what was loaded.
        error: what went wrong.
    """

    def __init__(self, load: Callable[[], ChatEngine]) -> None:
        super().__init__(name="glmtune-load", daemon=True)
        self._load = load
        self.chat: ChatEngine | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            chat = self._load()
            engine: Any = chat.engine
            engine.start()
            # Else Python looks for garbage among all objects of the libraries and the model, half a second
            # in which nothing is answered, as soon as many requests have come (measured: 0.7 s at the first
            # 64 clients).
            gc.collect()
            gc.freeze()
            self.chat = chat
        except BaseException as error:
            self.error = error


class _Server(uvicorn.Server):
    """uvicorn's server with our way to end; `capture_signals` is its own hook (0.29 to 0.54).

    Attributes:
        state: told when the end begins.
        num_signals: how often the end was asked for.
    """

    def __init__(
        self, config: uvicorn.Config, app: ServedApp, state: ServingState, limits: LimitSettings
    ) -> None:
        super().__init__(config)
        self._gate, self.state, self._drain_seconds = app.gate, state, limits.drain_seconds
        self.num_signals, self._deadline = 0, 0.0

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Take the signals that end a command; uvicorn's own would raise them again when it is done."""
        with handled_by(self._signalled):
            yield

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        leave_closed_terminal()
        self.num_signals += 1
        self.state.is_draining = True
        if self.num_signals == 1:
            self._deadline = time.monotonic() + self._drain_seconds
            return
        self._deadline = 0.0
        # Whatever is stuck, at once means at once.
        last = threading.Timer(LAST_SECONDS, _leave)
        last.daemon = True
        last.start()

    async def drain(self) -> None:
        """Wait until the end was asked for, then until nothing runs any more, at most up to the limit."""
        while not self.state.is_draining:
            await asyncio.sleep(TICK_SECONDS)
        if num_running := len(self._gate.running):
            write_error(
                f"glmtune: no more requests are taken; {num_running} may finish within"
                f" {self._drain_seconds:g} s (a second signal ends them at once).\n"
            )
        while self._gate.running and time.monotonic() < self._deadline:
            await asyncio.sleep(TICK_SECONDS)
        self._gate.end_all("shutdown")
        latest = time.monotonic() + LAST_SECONDS
        while self._gate.running and time.monotonic() < latest:
            await asyncio.sleep(TICK_SECONDS)


async def _serve(
    server: _Server,
    loading: _Loading,
    sockets: list[socket.socket],
    on_listening: Callable[[], None],
    on_ready: Callable[[ChatEngine], None],
) -> None:
    """Answer while the model loads and after, until the end."""
    serving = asyncio.create_task(server.serve(sockets))
    draining = asyncio.create_task(server.drain())
    while not (server.started or serving.done()):
        await asyncio.sleep(0)
    on_listening()
    loading.start()
    while loading.is_alive() and not draining.done():
        await asyncio.sleep(TICK_SECONDS)
    if loading.chat is not None:
        server.state.chat = loading.chat
        if not server.state.is_draining:
            on_ready(loading.chat)
    if loading.error is None:
        await asyncio.wait((draining, serving), return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    server.should_exit = True
    await serving


def _leave() -> None:
    """End the process as it is, in order towards whoever started it."""
    flush_output()
    os._exit(0)
