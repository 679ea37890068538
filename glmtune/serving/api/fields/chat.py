"""The fields of ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from glmtune.serving.api.errors import ApiError
from glmtune.serving.api.fields.body import shown_value
from glmtune.serving.api.fields.common import CommonFields, broken_rule, check_logprobs

# What /openapi.json says of messages and tools. Requests are not checked by these: pydantic would answer a
# wrong message with a problem for every form that it might have had, and our own checks name the one rule.
_TEXT_PARTS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    },
}
_CALL = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name", "arguments"],
            "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
        },
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool", "function", "observation"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "null"}, _TEXT_PARTS]},
        "name": {"type": "string"},
        "tool_calls": {"anyOf": [{"type": "array", "items": _CALL}, {"type": "null"}]},
        "tool_call_id": {"type": "string"},
    },
}
_TOOL = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "description": {"type": "string"},
                "parameters": {"type": "object"},
            },
        },
    },
}


def _messages(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise broken_rule("must be a list of objects with `role` and `content`")
    if not value:
        raise broken_rule("must hold at least one message")
    return value


def _tools(value: object) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise broken_rule("must be a list of objects with `type` and `function`")
    return value


Messages = Annotated[
    list[dict[str, Any]],
    BeforeValidator(_messages),
    WithJsonSchema({"type": "array", "items": _MESSAGE, "minItems": 1}),
]
Tools = Annotated[
    list[dict[str, Any]],
    BeforeValidator(_tools),
    WithJsonSchema({"anyOf": [{"type": "array", "items": _TOOL}, {"type": "null"}]}),
]
_NAMED = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
    },
}
ToolChoice = Annotated[
    Any, WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "null"}, _NAMED]})
]


class ChatFields(CommonFields):
    """What ``/v1/chat/completions`` takes."""

    messages: Messages = Field(description="oldest first; the last is the one to answer")
    max_completion_tokens: int | None = Field(None, ge=0, description="OpenAI's newer name of max_tokens")
    logprobs: bool | None = Field(None, description="report how likely each token was")
    top_logprobs: int | None = Field(None, description="and so many of the likeliest, 0 to 20")
    tools: Tools = Field(
        default_factory=list, description="functions that the model may call (ChatGLM3, GLM-4)"
    )
    tool_choice: ToolChoice = Field(
        None, description="none: announce no tools; auto: the model decides; a named one is called"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: the answer ends with its first call")
    continue_final_message: bool | None = Field(
        None, description="go on with the last message, which is the assistant's, instead of answering it"
    )
    add_generation_prompt: Literal[True, None] = Field(None, description="ask for an answer, as always")

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token; None: report nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None


def answer_tokens(fields: ChatFields) -> tuple[str, int | None]:
    """Return the limit of an answer, and by which name it was given.

    Raises:
        ApiError: two limits, or none is left.
    """
    old, new = fields.max_tokens, fields.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise ApiError(
            f"`max_tokens` is {old} and `max_completion_tokens` {new}, but they are one limit. Leave one"
            " out.",
            param="max_completion_tokens",
            code="invalid_value",
        )
    name = "max_tokens" if new is None else "max_completion_tokens"
    limit = old if new is None else new
    if limit == 0:
        raise ApiError(
            f"`{name}` is 0, but an answer has at least 1 token. Leave it out for the server's limit.",
            param=name,
            code="invalid_value",
        )
    return name, limit


def check_chat(fields: ChatFields) -> None:
    """Check the rules of log-probabilities and tools.

    Raises:
        ApiError: a rule is broken, or cannot be kept.
    """
    check_logprobs(fields.top_logprobs, "top_logprobs")
    if fields.top_logprobs and not fields.logprobs:
        raise ApiError(
            f'`top_logprobs` is {fields.top_logprobs}, but `logprobs` is not true. Add `"logprobs": true`.',
            param="top_logprobs",
            code="invalid_value",
        )
    for place, tool in enumerate(fields.tools):
        _check_tool(tool, f"tools[{place}]")


def _check_tool(tool: dict[str, Any], place: str) -> None:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise ApiError(
            f'`{place}` is {shown_value(tool)}, but it must be {{"type": "function", "function": {{...}}}}.',
            param=place,
            code="invalid_value",
        )
    name = function.get("name")
    if not isinstance(name, str) or not name.strip() or "\n" in name:
        raise ApiError(
            f"`{place}.function.name` is {shown_value(name)}, but it must be one line of text.",
            param=f"{place}.function.name",
            code="invalid_value",
        )
    if function.get("strict"):
        raise ApiError(
            f"`{place}.function.strict` is true, but arguments are not bound to a form here. Leave it out,"
            " and check them.",
            param=f"{place}.function.strict",
            code="unsupported_parameter",
        )
