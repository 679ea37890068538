"""OpenAI's messages as the templates take them: text joined, roles renamed, results in the calls' order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glmtune.models.templates.chat_messages import THOUGHTS_KEY
from glmtune.serving.api.errors import ApiError
from glmtune.serving.api.fields.body import shown_value
from glmtune.serving.api.fields.extra import unknown_field

_ROLES = {"developer": "system", "function": "tool"}
"""OpenAI's newer name of the system role, and its older one of a tool's result."""
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "observation")
_SHOWN_KEYS = ("role", "content", "tool_calls", "function_call", "metadata", "tool_call_id", "name")
_NO_TEXT = ("refusal", "annotations", "audio", THOUGHTS_KEY)
"""What OpenAI's replies hold beside the text; clients send them back, mostly empty."""
Message = dict[str, Any]


def conversation(
    messages: Sequence[Mapping[str, Any]], *, strict: bool, may_think: bool = False
) -> tuple[list[Message], list[str]]:
    """Return messages for a template, and the names of what no template shows.

    Args:
        messages: of a request, oldest first.
        strict: refuse unknown keys.
        may_think: the template may show thoughts of earlier answers, so ``reasoning_content`` is read.

    Raises:
        ApiError: a message has another form, with its place.
    """
    ignored: list[str] = []
    found: list[Message] = []
    for place, item in enumerate(messages):
        item, thoughts = dict(item), item.get(THOUGHTS_KEY)
        if may_think and thoughts and item.get("role") == "assistant":
            if not isinstance(thoughts, str):
                raise _wrong(f"messages[{place}].{THOUGHTS_KEY}", thoughts, "must be text")
            del item[THOUGHTS_KEY]
            found.append(_message(item, f"messages[{place}]", strict, ignored) | {THOUGHTS_KEY: thoughts})
        else:
            found.append(_message(item, f"messages[{place}]", strict, ignored))
    return _in_order_of_calls(found), ignored


def described_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what a template writes of tools: name, description and parameters, where they are given."""
    shown = ("name", "description", "parameters")
    return [{name: tool["function"][name] for name in shown if name in tool["function"]} for tool in tools]


def _message(item: Mapping[str, Any], place: str, strict: bool, ignored: list[str]) -> Message:
    role = item.get("role")
    if role not in _KNOWN_ROLES:
        raise _wrong(f"{place}.role", role, f"must be one of {', '.join(_KNOWN_ROLES)}")
    made: Message = {"role": _ROLES.get(role, role)}
    calls = {key: item[key] for key in ("tool_calls", "function_call") if item.get(key)}
    if calls and role != "assistant":
        raise _wrong(
            f"{place}.{next(iter(calls))}", next(iter(calls.values())), "belongs to the role assistant"
        )
    content = _text(item.get("content"), f"{place}.content")
    if content is None and role != "assistant":
        raise _wrong(f"{place}.content", None, "must be text")
    if content is None and not calls:
        content = ""
    if content is not None:
        made["content"] = content
    made |= calls
    for key in ("metadata", "tool_call_id", "name"):
        if (value := item.get(key)) is not None:
            if not isinstance(value, str):
                raise _wrong(f"{place}.{key}", value, "must be text")
            made[key] = value
    for key, value in item.items():
        if key not in _SHOWN_KEYS and not (key in _NO_TEXT and not value):
            if strict:
                raise unknown_field(f"{place}.{key}", [f"{place}.{known}" for known in _SHOWN_KEYS])
            ignored.append(f"messages.{key}")
    if "name" in made and role in ("user", "system", "developer", "assistant"):
        ignored.append("messages.name")  # no template shows who of several users speaks
    return made


def _text(content: object, place: str) -> str | None:
    """Return a content as text; parts of text are joined, as they stand one after the other."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(place, content, "must be text or a list of parts")
    texts: list[str] = []
    for number, part in enumerate(content):
        where = f"{place}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _wrong(where, part, 'must be {"type": "text", "text": ...}: these models read text alone')
        texts.append(part["text"])
    return "".join(texts)


def _in_order_of_calls(messages: list[Message]) -> list[Message]:
    """Put the results of several calls into their order: GLM shows which is which by order alone."""
    ordered: list[Message] = []
    places: dict[str, int] = {}
    run: list[Message] = []

    def close_run() -> None:
        if run and all(item.get("tool_call_id") in places for item in run):
            run.sort(key=lambda item: places[item["tool_call_id"]])
        ordered.extend(run)
        run.clear()

    for message in messages:
        if message["role"] in ("tool", "observation"):
            run.append(message)
            continue
        close_run()
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            ids = [call.get("id") for call in calls if isinstance(call, dict)]
            places = {each: place for place, each in enumerate(ids) if isinstance(each, str)}
        ordered.append(message)
    close_run()
    return ordered


def _wrong(place: str, value: object, rule: str) -> ApiError:
    return ApiError(f"`{place}` is {shown_value(value)}, but it {rule}.", param=place, code="invalid_value")
