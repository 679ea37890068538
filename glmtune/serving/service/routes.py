"""The routes that are not OpenAI's: /health, /metrics, and the chat page at /."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, PlainTextResponse, Response

from glmtune.serving.api.state import ServingState
from glmtune.serving.service.metrics import Metrics
from glmtune.serving.service.phases import phase

PAGE = Path(__file__).with_name("page.html")


def create_service_router(state: ServingState, metrics: Metrics, *, has_page: bool) -> APIRouter:
    """Return the routes.

    Args:
        state: what they tell of.
        metrics: what Prometheus is told.
        has_page: whether the chat page is served.
    """
    router = APIRouter()

    async def health() -> Response:
        # On the event loop, without a look at the engine: it answers while a prompt is read.
        now = phase(state)
        return JSONResponse({"status": now}, 200 if now == "ready" else 503, {"Cache-Control": "no-store"})

    async def metrics_text() -> Response:
        # In a thread: the engine's statistics may wait for its lock.
        return Response(await run_in_threadpool(metrics.text), media_type=CONTENT_TYPE_LATEST)

    async def page() -> Response:
        content, headers = _page()
        return Response(content, headers=headers, media_type="text/html")

    unready: dict[int | str, dict[str, Any]] = {
        503: {"description": "the model is being loaded, or the server is about to end"}
    }
    for method in ("GET", "HEAD"):
        router.add_api_route(
            "/health",
            health,
            methods=[method],
            summary="Whether requests are taken",
            responses=unready,
            include_in_schema=method == "GET",
        )
    router.add_api_route(
        "/metrics",
        metrics_text,
        methods=["GET"],
        summary="Figures for Prometheus",
        response_class=PlainTextResponse,
    )
    if has_page:
        router.add_api_route("/", page, methods=["GET", "HEAD"], include_in_schema=False)
    return router


@cache
def _page() -> tuple[bytes, dict[str, str]]:
    """Return the chat page, with headers that forbid it whatever it does not need.

    Its one script and one style sheet are named by their hashes, so that nothing a model writes could ever
    run, even if it came to stand in the page; and it may talk to this server alone.
    """
    text = PAGE.read_text(encoding="utf-8")
    sources = {
        tag: " ".join(
            f"'sha256-{_hash(found)}'" for found in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; connect-src"
        " 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return text.encode(), headers


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
