"""Values read from files, held against a description of what they must be.

What a run has left may come back edited by hand, cut off, or written by another tool. A pydantic model says
what a file holds (strict types, finite numbers, further keys allowed, since other tools write some), and one
sentence says what does not fit, by its key.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SHOWN_CHARS = 60
"""Of a value in an error: enough to find it, short enough to read."""
MAX_COUNT = 2**53
"""Above any count of samples, tokens or bytes, and exact as a float."""

MAX_DEPTH = 64
"""Of nested values; far deeper ones overrun the stack of whoever reads or writes them next."""

Count = Annotated[int, Field(ge=0, le=MAX_COUNT, description="a whole number from 0")]
Text = Annotated[str, Field(description="a text")]
OptionalText = Annotated[str | None, Field(description="a text or null")]


class Record(BaseModel):
    """Base of descriptions: no value is converted, no number is infinite, further keys are let through."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


Described = TypeVar("Described", bound=Record)


def validated(description: type[Described], values: Mapping[str, Any]) -> Described:
    """Return values as their description has them.

    Args:
        description: what they must be; its fields' descriptions complete "it must be ...".
        values: as read from a file.

    Raises:
        ValueError: a key is missing or has another kind of value; the message names key and value.
    """
    for name, value in values.items():
        if _is_deep(value):
            raise ValueError(f"`{name[:SHOWN_CHARS]}` is nested more than {MAX_DEPTH} deep")
    try:
        return description.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(str(part) for part in found["loc"])
    if found["type"] == "missing":
        raise ValueError(f"the field `{name}` is missing")
    field = description.model_fields.get(str(found["loc"][0])) if found["loc"] else None
    rule = field.description if field is not None and field.description else None
    rule = f"it must be {rule}" if rule else str(found["msg"])[:1].lower() + str(found["msg"])[1:]
    raise ValueError(f"`{name}` is {shown(found['input'])}, but {rule}")


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _parts(outer)]
        if not level:
            return False
    return True


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def shown(value: object) -> str:
    """Write a value of any size or depth for an error."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (RecursionError, TypeError, ValueError):
        text = type(value).__name__
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."
