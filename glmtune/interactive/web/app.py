"""From an answerer to the application that shows the page."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.resources import files

import gradio as gr
from fastapi import FastAPI

from glmtune.interactive.answerer import Answerer
from glmtune.interactive.web.answering import Pages
from glmtune.interactive.web.events import PageEvents
from glmtune.interactive.web.guard import Guard
from glmtune.interactive.web.login import Login
from glmtune.interactive.web.page import lay_out, theme
from glmtune.interactive.web.settings import WebSettings
from glmtune.interactive.web.words import CHINESE, ENGLISH, Words


def build_app(
    answerer: Answerer, settings: WebSettings, login: Login | None
) -> tuple[Guard, Callable[[], None]]:
    """Build the page.

    Args:
        answerer: who answers.
        settings: where the page is served, and to whom.
        login: who may log in; None: everybody may come.

    Returns:
        The application, and what ends all answers.
    """
    pages = Pages()

    def connect(blocks: gr.Blocks, words: Words) -> None:
        page = lay_out(answerer, words, has_login=login is not None)
        PageEvents(answerer, pages, page).connect(blocks, max_answers=settings.max_answers)

    title = f"{answerer.model_name} · glmtune"
    with gr.Blocks(title=title, fill_height=True, analytics_enabled=False) as blocks:
        connect(blocks, ENGLISH)

        def leave(request: gr.Request) -> None:
            """Stop what is being written to a tab that was closed."""
            pages.stop(request.session_hash or "")

        with warnings.catch_warnings():  # Gradio counts the request as a missing argument
            warnings.filterwarnings("ignore", message="Expected", category=UserWarning)
            blocks.unload(leave)
    with blocks.route(CHINESE.other, CHINESE.path, show_in_navbar=False):
        connect(blocks, CHINESE)
    blocks.queue(max_size=settings.max_waiting, api_open=False, default_concurrency_limit=None)
    # It would warn that two pages cannot be rendered here, which is off anyway.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SSR mode", category=UserWarning)
        app = gr.mount_gradio_app(
            FastAPI(openapi_url=None),
            blocks,
            path="/",
            server_name=settings.server_name,
            server_port=settings.server_port,
            auth=login.check if login else None,
            footer_links=[],
            run_history=False,
            allowed_paths=[],
            max_file_size=0,
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            pwa=False,
            theme=theme(),
            css=files("glmtune.interactive.web").joinpath("page.css").read_text(encoding="utf-8"),
        )
    return Guard(app, allowed_hosts=settings.hosts, language=settings.language), pages.stop_all
