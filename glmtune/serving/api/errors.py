"""Every error of the server in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from glmtune.errors import ConfigError, DataError, GlmtuneError
from glmtune.inference.requests.engine_state import EngineBusyError, EngineClosedError, NoSuchAdapterError

LOGGER = logging.getLogger(__name__)

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large",
          415: "unsupported_media_type"}  # fmt: skip
_FIELD_NAMES = {"max_new_tokens": "max_tokens", "strength": "prefix_strength", "prompt_logprobs": "logprobs"}
"""What the engine calls otherwise than OpenAI."""


class ApiError(GlmtuneError):
    """A request that is refused or failed, as its client is told.

    Attributes:
        status: of HTTP.
        code: short name for programs, such as ``model_not_found``.
        param: the field at fault, such as ``messages[0].role``.
        headers: to send with it, such as ``Retry-After``.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Take what to tell."""
        super().__init__(message)
        self.status, self.param, self.headers = status, param, dict(headers or {})
        self.code = code or _CODES.get(status)

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The error in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def json_bytes(value: object) -> bytes:
    """Return JSON in UTF-8; halves of surrogate pairs, which UTF-8 cannot hold, become question marks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def error_response(error: ApiError) -> Response:
    """Return the reply that tells an error."""
    return Response(json_bytes(error.body), error.status, error.headers, "application/json")


def as_api_error(error: GlmtuneError) -> ApiError:
    """Return an error of ours as a client is told.

    What a request is at fault for is 400, with the field that the message names first; a full queue 429, an
    engine that stops 503, and everything else 500.
    """
    match error:
        case ApiError():
            return error
        case EngineBusyError():
            return ApiError(str(error), status=429, code="queue_full", headers={"Retry-After": "1"})
        case EngineClosedError():
            return ApiError(str(error), status=503, code="stopping", headers={"Retry-After": "10"})
        case NoSuchAdapterError():  # removed while the request was read
            return ApiError(str(error), status=404, code="model_not_found", param="model")
        case ConfigError() | DataError():
            found = re.search(r"`([a-z_]+)`", str(error))
            name = found[1] if found else None
            message = str(error)
            if name in _FIELD_NAMES:
                message = message.replace(f"`{name}`", f"`{_FIELD_NAMES[name]}`")
            return ApiError(message, param=_FIELD_NAMES.get(name or "", name), code="invalid_value")
        case _:
            return ApiError(str(error), status=500, code="engine_error")


def install_error_handlers(app: FastAPI) -> None:
    """Let an application answer every error in OpenAI's form, its own unknown paths and methods included."""

    async def ours(_: Request, error: Exception) -> Response:
        assert isinstance(error, GlmtuneError)
        return error_response(as_api_error(error))

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(_http_error(request, error))

    async def of_fields(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first: Mapping[str, Any] = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return error_response(ApiError(f"`{place}`: {first['msg']}.", param=place, code="invalid_value"))

    async def unexpected(_: Request, error: Exception) -> Response:
        # What happened stands in the log (the framework writes it there); it is no business of clients.
        return error_response(
            ApiError("The server failed. Its log says more.", status=500, code="internal_error")
        )

    app.add_exception_handler(GlmtuneError, ours)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_fields)
    app.add_exception_handler(Exception, unexpected)


def _http_error(request: Request, error: HTTPException) -> ApiError:
    """Word what the framework refuses by itself."""
    method, path = request.method, request.url.path[:100]
    message = str(error.detail)
    if message == HTTPStatus(error.status_code).phrase:  # the framework has nothing more to say
        if error.status_code == 404:
            message = f"`{method} {path}` does not exist here. The routes stand in /openapi.json."
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"`{path}` does not take {method}. Use {allowed}."
    return ApiError(message, status=error.status_code, headers=error.headers)
