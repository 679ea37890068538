"""Read the single messages of conversation lists as ShareGPT, OpenAI and the releases' READMEs write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from glmtune.data.reading.json_values import clipped, kind_of, listed, text_of
from glmtune.data.records import RowProblem
from glmtune.errors import DataError
from glmtune.messages import Message
from glmtune.models.templates.thinking import CLOSE, OPEN, has_thoughts, join_thoughts
from glmtune.models.templates.tool_calls import (
    CARRIED_BY_ORDER,
    call_message,
    read_call,
    read_calls,
    read_tools,
)

_CALL = "function_call"
ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "chatglm": "assistant",
    "bot": "assistant",
    "model": "assistant",
    _CALL: "assistant",
    "observation": "observation",
    "tool": "observation",
    "function": "observation",
    "function_response": "observation",
}
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Where an answer's thoughts stand beside it: in replies of DeepSeek and vLLM, OpenRouter, some data."""
_TEXT_KEYS = ("role", "from", "content", "value", "metadata", "loss", "weight", *THOUGHT_KEYS)
_TOOL_KEYS = ("tools", "tool_calls", _CALL, "parameters", "observation")
_READ_KEYS = frozenset((*_TEXT_KEYS, *_TOOL_KEYS, *CARRIED_BY_ORDER))


def read_message(item: object, place: str) -> list[Message]:
    """Read one item of a ``messages`` or ``conversations`` list, role/content and from/value alike.

    Args:
        item: an object with a role and a text; `glmtune.models.templates.tool_calls` shows those with tools.
        place: where it stands in the row, for messages.

    Returns:
        One message, or several: a text and its calls of tools, or a call and what it gave.

    Raises:
        RowProblem: the field, what is wrong with it and what to do.
    """
    if not isinstance(item, dict):
        raise RowProblem(f"`{place}` must be an object with a role and a text, but it is {kind_of(item)}.")
    role_key = next((key for key in ("role", "from") if key in item), None)
    if role_key is None:
        raise RowProblem(f"`{place}` names no role; it has {listed(item)}. Use role/content or from/value.")
    given = str(item[role_key]).lower()
    if given not in ROLE_NAMES:
        found, valid = clipped(str(item[role_key])), ", ".join(ROLE_NAMES)
        raise RowProblem(f"`{place}.{role_key}` is `{found}`, but must be one of {valid}.")
    text_key = "content" if role_key == "role" else "value"
    try:
        if given == _CALL:
            return [read_call(item.get(text_key), f"{place}.{text_key}", has_loss=_has_loss(item, place))]
        return _messages(item, ROLE_NAMES[given], text_key, place)
    except DataError as error:
        raise RowProblem(str(error)) from None


def _messages(item: Mapping[str, object], role: str, text_key: str, place: str) -> list[Message]:
    has_loss = _has_loss(item, place)
    if role == "observation" and item.get("parameters") is not None:
        return _call_and_result(item, place, has_loss)
    thoughts = _thoughts(item, role, place)
    calls = read_calls(item, place, has_loss=has_loss)
    if calls:
        _refuse_other_role(role, place, "calls tools", "assistant")
        text = join_thoughts(thoughts, _joined_parts(item.get(text_key) or "", f"{place}.{text_key}"))
        return [Message(role, text, has_loss=has_loss), *calls] if text.strip() else calls
    tools = read_tools(item.get("tools"), f"{place}.tools")
    if tools:
        _refuse_other_role(role, place, "announces tools", "system")
    # Tools alone are a system message, too: README layouts leave its text empty, or null.
    content = item.get(text_key)
    content = "" if tools and content is None else _joined_parts(content, f"{place}.{text_key}")
    metadata = item.get("metadata") or ""
    if not isinstance(metadata, str):
        raise RowProblem(f"`{place}.metadata` must be a string, but it is {kind_of(metadata)}.")
    return [Message(role, join_thoughts(thoughts, content), metadata, tools=tools, has_loss=has_loss)]


def _thoughts(item: Mapping[str, object], role: str, place: str) -> str:
    """Return the thoughts that stand beside an answer; "" if none do."""
    given = {key: item[key] for key in THOUGHT_KEYS if item.get(key)}
    if not given:
        return ""
    key, thoughts = next(iter(given.items()))
    if not isinstance(thoughts, str):
        raise RowProblem(f"`{place}.{key}` must be a string, but it is {kind_of(thoughts)}.")
    if len(set(map(str, given.values()))) > 1:
        names = " and ".join(f"`{name}`" for name in given)
        raise RowProblem(f"`{place}` has other thoughts in {names}. Keep one.")
    _refuse_other_role(role, place, f"has thoughts (`{key}`)", "assistant")
    text = item.get("content", item.get("value"))
    if isinstance(text, str) and has_thoughts(text):
        raise RowProblem(
            f"`{place}` has thoughts in `{key}` and in its text, between `{OPEN}` and `{CLOSE}`. Keep one."
        )
    return thoughts


def unread_keys(items: object) -> set[str]:
    """Return the keys of a message list that nothing reads, such as ``name``.

    Args:
        items: the list, or anything a row may hold in its place.
    """
    if not isinstance(items, Sequence) or isinstance(items, str):
        return set()
    found = {str(key) for item in items if isinstance(item, Mapping) for key in item}
    return found - _READ_KEYS


def _has_loss(item: Mapping[str, object], place: str) -> bool:
    """Return whether a message is to be learnt: `loss` of ChatGLM3's scripts, `weight` of OpenAI's format."""
    for key in ("loss", "weight"):
        value = item.get(key)
        if value is not None and (not isinstance(value, bool | int | float) or value not in (0, 1)):
            raise RowProblem(
                f"`{place}.{key}` is {value!r}, but a message is learnt or it is not: "
                f"{'true or false' if key == 'loss' else '1 or 0'}. Correct it, or leave the message out."
            )
    return all(item.get(key) is None or bool(item[key]) for key in ("loss", "weight"))


def _joined_parts(content: object, place: str) -> str:
    """Return the text of a message whose content may come as a list of text parts."""
    if (plain := text_of(content)) is not None:
        return plain
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        found = "is missing" if content is None else f"is {kind_of(content)}"
        raise RowProblem(f"`{place}` must be a string, but it {found}. Give the text of the message.")
    texts: list[str] = []
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            raise RowProblem(
                f"`{place}[{number}]` must be a text part, but it is {kind_of(part)}. Only text is learnt."
            )
        texts.append(text)
    return "".join(texts)


def _refuse_other_role(role: str, place: str, what: str, rule: str) -> None:
    if role != rule:
        raise RowProblem(
            f"`{place}` comes from `{role}` and {what}, which only `{rule}` does. Correct its role."
        )


def _call_and_result(item: Mapping[str, object], place: str, has_loss: bool) -> list[Message]:
    """Read a tool's item of ChatGLM3's README, which holds the call and what it gave."""
    name = item.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RowProblem(f"`{place}.name` is missing, the name of the tool that `parameters` belong to.")
    call = call_message(name, item["parameters"], f"{place}.parameters", has_loss=has_loss)
    result = item.get("observation")
    if result is None:
        raise RowProblem(f"`{place}.observation` is missing, what the tool gave for `parameters`.")
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    return [call, Message("observation", text)]
