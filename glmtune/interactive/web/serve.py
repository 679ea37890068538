"""Serving the page: what must hold before Gradio is imported, and the end."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Generator, Sequence
from importlib import import_module

from glmtune.errors import MissingExtraError
from glmtune.interactive.answerer import Answerer
from glmtune.interactive.web.login import Login
from glmtune.interactive.web.settings import WebSettings
from glmtune.signals import handled_by, leave_closed_terminal

CLOSING_SECONDS = 3
"""Open pages hold connections that never end by themselves."""


def prepare() -> None:
    """Keep Gradio from calling home, and see that it is there. Call this before anything imports it.

    Raises:
        MissingExtraError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_SHARE"] = "False"
    os.environ["GRADIO_SSR_MODE"] = "False"
    os.environ["GRADIO_MCP_SERVER"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    try:
        import_module("gradio")
    except ImportError:
        raise MissingExtraError("`glmtune web` (of Gradio)", extra="web") from None


def serve(
    answerer: Answerer, settings: WebSettings, login: Login | None, sockets: Sequence[socket.socket]
) -> None:
    """Serve the page until a signal ends it: in order at the first, at once at the second.

    Args:
        answerer: who answers.
        settings: see `build_app`.
        login: see `build_app`.
        sockets: from `glmtune.listening.listen`.
    """
    import uvicorn

    # Gradio is imported here, after `prepare`.
    from glmtune.interactive.web.app import build_app

    app, stop_all = build_app(answerer, settings, login)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )

    class Server(uvicorn.Server):
        """uvicorn's own raises the signal again when it is done: the exit code would not be 0."""

        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None]:  # its hook, from 0.29 to 0.54
            with handled_by(self._end):
                yield

        def _end(self, number: int, frame: object) -> None:
            leave_closed_terminal()
            self.should_exit, self.force_exit = True, self.should_exit

    try:
        Server(config).run(sockets=list(sockets))
    finally:
        stop_all()
