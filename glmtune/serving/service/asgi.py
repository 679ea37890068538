"""The words of ASGI that middleware needs, and how it answers with an error, below any framework."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from glmtune.serving.api.errors import ApiError, json_bytes

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


async def send_error(send: Send, error: ApiError) -> None:
    """Answer a request with an error in OpenAI's form.

    Args:
        send: of the request.
        error: its status, headers and words.
    """
    body = json_bytes(error.body)
    fields = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    start = [(name.lower().encode(), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": start})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def header(scope: Scope, name: str) -> str | None:
    """Return a header of a request, the first of its name; None where there is none.

    Args:
        scope: of the request.
        name: in lower case.
    """
    wanted = name.encode()
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == wanted), None)
