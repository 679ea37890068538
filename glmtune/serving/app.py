"""The application: the routes, and around them what `glmtune.serving.service` does with every request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from glmtune.serving.api.errors import install_error_handlers
from glmtune.serving.api.router import create_router
from glmtune.serving.api.state import AnsweredRequest, ServingState
from glmtune.serving.service.admin import create_admin_router
from glmtune.serving.service.gate import Gate
from glmtune.serving.service.guard import LOOPBACK_NAMES, Guard, Keys, Rules
from glmtune.serving.service.metrics import Metrics
from glmtune.serving.service.request_log import RequestLog, note_answered
from glmtune.serving.service.routes import create_service_router
from glmtune.serving.settings import AccessSettings, AnswerSettings, LimitSettings
from glmtune.version import __version__

EXPOSED = ("X-Request-ID", "Retry-After", "X-Glmtune-Ignored-Fields")
"""Headers of replies that pages of other origins may read."""


@dataclass(frozen=True)
class ServedApp:
    """The application and the part of it that ends requests.

    Attributes:
        asgi: what uvicorn runs.
        gate: takes requests on.
        routes: the framework's own part, with the description of the routes.
    """

    asgi: ASGIApp
    gate: Gate
    routes: FastAPI


def create_app(
    state: ServingState,
    *,
    access: AccessSettings,
    limits: LimitSettings,
    answers: AnswerSettings,
    rules: Rules,
) -> ServedApp:
    """Put the application together.

    Args:
        state: what the routes share; its `on_answered` is set here.
        access: which routes there are, and which origins may use them.
        limits: how much is taken on.
        answers: what of them is logged.
        rules: who is let in; from `access_rules`.
    """
    # The framework's pages of documentation load their scripts from another host: a reader's browser would
    # tell it.
    app = FastAPI(
        title="glmtune", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json"
    )
    metrics = Metrics(state)
    app.include_router(create_service_router(state, metrics, has_page=access.page))
    app.include_router(create_router(state))
    if access.admin:
        assert access.adapter_dir is not None
        app.include_router(create_admin_router(state, Path(access.adapter_dir)))
    install_error_handlers(app)

    def answered(what: AnsweredRequest) -> None:
        metrics.note_answered(what)
        note_answered(what)

    state.on_answered = answered
    gate = Gate(app, state, limits)
    inside = Guard(gate, rules)
    if access.cors_origins:
        # Outside the guard: a refusal carries the headers, too, or a page could not read why.
        inside = CORSMiddleware(
            inside,
            allow_origins=[origin.lower() for origin in access.cors_origins],
            allow_methods=["GET", "POST", "DELETE", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    return ServedApp(RequestLog(inside, metrics, logs_contents=answers.log_contents), gate, app)


def access_rules(
    access: AccessSettings, *, host: str, is_loopback: bool, keys: list[str], admin_keys: list[str]
) -> Rules:
    """Say who is let in.

    Args:
        access: what was set.
        host: that the server listens on.
        is_loopback: whether only this machine reaches it: then no Host but its own is answered, nor pages of
            other origins. Elsewhere it cannot know its names, and keys are what protects it.
        keys: of the API.
        admin_keys: of the administrator.
    """
    hosts = None
    if access.allowed_hosts is not None:
        hosts = None if "*" in access.allowed_hosts else {each.lower() for each in access.allowed_hosts}
    if hosts is None and access.allowed_hosts is None and is_loopback:
        hosts = set()
    if hosts is not None and is_loopback:
        hosts |= {*LOOPBACK_NAMES, f"[{host}]" if ":" in host else host.lower()}
    return Rules(
        hosts=hosts,
        origins=frozenset(origin.lower() for origin in access.cors_origins or ()),
        checks_origin=is_loopback,
        keys=Keys(keys),
        admin_keys=Keys(admin_keys),
    )
