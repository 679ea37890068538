"""Read the single messages of conversation lists as ShareGPT and OpenAI write them."""

from __future__ import annotations

import json

from glmtune.data.reading.json_rows import kind_of
from glmtune.data.records import RowProblem
from glmtune.messages import Message

ROLE_NAMES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "chatglm": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "observation",
    "tool": "observation",
    "function": "observation",
    "function_response": "observation",
}


def read_message(item: object, place: str) -> list[Message]:
    """Read one item of a ``messages`` or ``conversations`` list, role/content and from/value alike.

    Args:
        item: an object with a role and a text; an OpenAI assistant may have ``tool_calls`` instead of a text.
        place: where it stands in the row, for messages.

    Returns:
        One message, or one per tool call.

    Raises:
        RowProblem: the field, what is wrong with it and what to do.
    """
    if not isinstance(item, dict):
        raise RowProblem(f"`{place}` must be an object with a role and a text, but it is {kind_of(item)}.")
    role_key = next((key for key in ("role", "from") if key in item), None)
    if role_key is None:
        raise RowProblem(
            f"`{place}` names no role; it has {', '.join(map(str, item))}. Use role/content or from/value."
        )
    role = ROLE_NAMES.get(str(item[role_key]).lower())
    if role is None:
        raise RowProblem(
            f"`{place}.{role_key}` is `{item[role_key]}`, but must be one of {', '.join(ROLE_NAMES)}."
        )
    text_key = "content" if role_key == "role" else "value"
    if item.get("tool_calls"):
        return [
            _tool_call(call, f"{place}.tool_calls[{number}]")
            for number, call in enumerate(item["tool_calls"])
        ]
    content = _joined_parts(item.get(text_key), f"{place}.{text_key}")
    metadata = item.get("metadata") or ""
    if not isinstance(metadata, str):
        raise RowProblem(f"`{place}.metadata` must be a string, but it is {kind_of(metadata)}.")
    return [Message(role, content, metadata)]


def _joined_parts(content: object, place: str) -> str:
    """Return the text of a message whose content may come as a list of text parts."""
    if isinstance(content, str):
        return content
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


def _tool_call(call: object, place: str) -> Message:
    """Write an OpenAI tool call the way ChatGLM3 does: the tool's name, then a call with its arguments."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem(
            f"`{place}.function.name` is missing. A tool call needs function.name and function.arguments."
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise RowProblem(
            f"`{place}.function.arguments` must be a JSON object, but it is {kind_of(arguments)}."
        )
    words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return Message("assistant", f"```python\ntool_call({words})\n```", function["name"])
