"""The routes by their paths; with `errors`, `create_router` is all that an application needs."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from glmtune.serving.api import chat, completions, original
from glmtune.serving.api.errors import json_bytes
from glmtune.serving.api.fields.chat import ChatFields
from glmtune.serving.api.fields.completion import CompletionFields
from glmtune.serving.api.fields.original import OriginalFields
from glmtune.serving.api.models import listing, one_model
from glmtune.serving.api.openapi import body_of, replies_of
from glmtune.serving.api.state import ServingState

REFUSALS = (400, 404, 413, 415, 429, 500, 503)


def create_router(state: ServingState) -> APIRouter:
    """Return the routes over what they share.

    Args:
        state: see there; its engine may come later.
    """
    router = APIRouter()

    @router.post(
        chat.PATH,
        summary="Answer a conversation",
        openapi_extra=body_of(ChatFields),
        responses=replies_of("The answer, whole or as a stream.", stream=True, refusals=REFUSALS),
        response_class=Response,
    )
    async def chat_completions(request: Request) -> Response:
        return await chat.chat_completions(state, request)

    @router.post(
        completions.PATH,
        summary="Go on with a text",
        openapi_extra=body_of(CompletionFields),
        responses=replies_of("What follows, whole or as a stream.", stream=True, refusals=REFUSALS),
        response_class=Response,
    )
    async def text_completions(request: Request) -> Response:
        return await completions.completions(state, request)

    @router.get(
        "/v1/models",
        summary="The base, and every prefix and LoRA over it",
        responses=replies_of("The models.", refusals=(503,)),
        response_class=Response,
    )
    async def models() -> Response:
        return Response(json_bytes(listing(state)), media_type="application/json")

    @router.get(
        "/v1/models/{model_id:path}",  # names of hubs hold a slash
        summary="One model",
        responses=replies_of("The model.", refusals=(404, 503)),
        response_class=Response,
    )
    async def model(model_id: str) -> Response:
        return Response(json_bytes(one_model(state, model_id)), media_type="application/json")

    @router.post(
        original.PATH,
        summary="Answer a question in its history (the contract of the official api.py)",
        openapi_extra=body_of(OriginalFields, "application/json", "text/plain"),
        responses=replies_of("The answer and the longer history.", refusals=REFUSALS),
        response_class=Response,
    )
    async def original_api(request: Request) -> Response:
        return await original.original(state, request)

    return router
