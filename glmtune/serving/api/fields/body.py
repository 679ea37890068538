"""Bodies of requests: bytes in, checked fields out; a client is told what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from glmtune.serving.api.errors import ApiError

Fields = TypeVar("Fields", bound=BaseModel)

SHOWN_CHARS = 60
"""Longest value that an error quotes."""
MAX_PROBLEMS = 10
"""Most problems that an error lists."""

_RULES = {
    "missing": "is missing",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "finite_number": "must be a finite number",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
    "too_short": "must hold at least {min_length}",
    "too_long": "must hold at most {max_length}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
}
"""Pydantic's types of error in our words."""


def check_json_type(request: Request) -> None:
    """Check that a body says it is JSON.

    Not for tidiness: a browser sends any page's text/plain to any server without asking it first, also to one
    that listens on this machine alone; for JSON it asks.

    Raises:
        ApiError: it says something else, or nothing.
    """
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(
            f"The content type is {_quoted(given) if given else 'missing'}, but it must be application/json."
            " With curl add `-H 'Content-Type: application/json'`.",
            status=415,
        )


async def read_body(request: Request) -> bytes:
    """Return the body as it is.

    Raises:
        ApiError: it is compressed.
    """
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise ApiError(
            f"The content encoding is {_quoted(coding)}, but bodies must come as they are."
            " Send it uncompressed.",
            status=415,
        )
    return await request.body()


def parse_object(raw: bytes) -> dict[str, Any]:
    """Return the JSON object that a body is.

    The parser knows no NaN and no half of a surrogate pair, and follows brackets to a depth of 200.

    Raises:
        ApiError: it is none, with the place.
    """
    if not raw.strip():
        raise ApiError("The body is empty, but it must be a JSON object.", code="invalid_json")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise ApiError(
            f"The body is not UTF-8 (byte {error.start}). Encode it as UTF-8.", code="invalid_json"
        ) from None
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"The body is no JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(
            f'The body is a JSON {_kind(value)}, but it must be an object such as {{"model": ...}}.',
            code="invalid_json",
        )
    return value


def checked(fields: type[Fields], values: Mapping[str, Any]) -> Fields:
    """Return the fields of a request.

    Raises:
        ApiError: with every problem; ``param`` is the first.
    """
    try:
        return fields.model_validate(values)
    except ValidationError as error:
        # Of a value that may have several types pydantic lists a problem for each: a place's first counts.
        found = {place_of(each["loc"]): each for each in reversed(error.errors(include_url=False))}
        places = list(reversed(found))
        lines = [_problem(place, found[place]) for place in places[:MAX_PROBLEMS]]
        if len(places) > MAX_PROBLEMS:
            lines.append(f"There are {len(places) - MAX_PROBLEMS} more.")
        raise ApiError("\n".join(lines), param=places[0], code="invalid_value") from None


def place_of(parts: Sequence[int | str]) -> str:
    """Return where a value stands, such as ``messages[0].role``."""
    place = ""
    for part in parts:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else part
    return place


def shown_value(value: object) -> str:
    """Return a value as JSON, cut where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        text = str(type(value))
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."


def _problem(place: str, error: Mapping[str, Any]) -> str:
    if error["type"] == "missing":
        return f"`{place}` is missing, but this route needs it."
    rule = _RULES.get(error["type"])
    text = error["msg"] if rule is None else rule.format(**error.get("ctx", {}))
    return f"`{place}` is {shown_value(error['input'])}, but it {text}."


def _kind(value: object) -> str:
    names: dict[type, str] = {list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _quoted(text: str) -> str:
    return f"`{text[:SHOWN_CHARS]}`"
