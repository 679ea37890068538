"""What the OpenAPI description says of bodies and replies that the routes read and write themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]

_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def body_of(fields: type[BaseModel], *kinds: str) -> Schema:
    """Return the description of a route whose body holds these fields, as JSON of these content types."""
    schema = fields.model_json_schema()
    whole = _without_references(schema, schema.get("$defs", {}))
    whole.pop("$defs", None)
    content = {kind: {"schema": whole} for kind in kinds or ("application/json",)}
    return {"requestBody": {"required": True, "content": content}}


def replies_of(
    description: str, *, stream: bool = False, refusals: tuple[int, ...] = ()
) -> dict[int | str, Any]:
    """Return the description of a route's replies: its own, as JSON or as a stream too, and refusals."""
    content: Schema = {"application/json": {"schema": {"type": "object"}}}
    if stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    refused = {
        "description": "refused or failed, in OpenAI's form",
        "content": {"application/json": {"schema": _ERROR}},
    }
    replies: dict[int | str, Any] = {200: {"description": description, "content": content}}
    return replies | dict.fromkeys(refusals, refused)


def _without_references(node: Any, definitions: Schema) -> Any:
    """Put definitions where they are referred to: inside a description ``#/$defs`` would mean its root."""
    if isinstance(node, list):
        return [_without_references(each, definitions) for each in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        name = str(node["$ref"]).rpartition("/")[2]
        return _without_references(definitions[name], definitions)
    return {key: _without_references(value, definitions) for key, value in node.items()}
