r"""Tools and their calls as other libraries write them; each template writes them in its release's form.

    OpenAI         {"role": "assistant", "content": "Let me look.", "tool_calls": [{"function": {...}}, ...]}
    OpenAI, old    {"role": "assistant", "content": null, "function_call": {"name": ..., "arguments": "{}"}}
    ShareGPT       {"from": "function_call", "value": "{\"name\": ..., \"arguments\": {...}}"}
    ChatGLM3       {"role": "tool", "name": ..., "parameters": {...}, "observation": ...}
    GLM-4          {"role": "assistant", "metadata": the tool's name, "content": "{...}"}

Every call becomes a message of its own whose content is the JSON of its arguments; `write_tools` turns it
into the release's words once the template is known.

Sources:
    READMEs of ``finetune_demo`` in THUDM/ChatGLM3 and THUDM/GLM-4; OpenAI's formats of chats and of data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from glmtune.errors import DataError
from glmtune.messages import Message
from glmtune.models.templates.base import Template

CARRIED_BY_ORDER = frozenset({"tool_call_id", "id", "name"})
"""Keys that say which call a result answers: GLM's templates show that by the order of the messages alone."""


def write_tools(template: Template, messages: Sequence[Message]) -> list[Message]:
    """Return messages whose tools and calls are text, as the release writes them.

    Args:
        template: of the release.
        messages: oldest first; those without tools stay as they are.

    Raises:
        DataError: the template knows no tools.
    """
    written: list[Message] = []
    for message in messages:
        if message.tools:
            tools = [described(tool) for tool in json.loads(message.tools)]
            announced = template.announce_tools(message.content, tools)
            # What a folder's own template describes itself stays beside the content.
            message = replace(message, content=announced.content, tools=announced.tools)
        elif message.is_call:
            text = template.call_text(json.loads(message.content))
            message = replace(message, content=text, is_call=False)
        written.append(message)
    return written


def described(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return name, description and parameters of a tool; OpenAI's wrapping around them is taken off."""
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) and set(tool) <= {"type", "function"} else tool


def read_tools(value: object, place: str) -> str:
    """Return a list of tools as JSON, empty where there is none.

    Args:
        value: descriptions, or their JSON as a string.
        place: where they stand, for the message.

    Raises:
        DataError: it is no list of objects.
    """
    if isinstance(value, str) and value.strip():
        value = parsed(value)
    if value is None or value in ("", []):
        return ""
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(
            f"`{place}` is {str(value)[:40]!r}, but it must be a list of tool descriptions (objects with"
            " `name`, `description` and `parameters`). Correct it, or leave it out."
        )
    return json.dumps(value, ensure_ascii=False)


def read_calls(item: Mapping[str, Any], place: str, *, has_loss: bool = True) -> list[Message]:
    """Return the calls that a message makes by ``tool_calls`` or ``function_call``, one message each.

    Args:
        item: a message of another library.
        place: where it stands, for errors.
        has_loss: whether training learns them.

    Raises:
        DataError: a call without name, or arguments that are no object.
    """
    calls = item.get("tool_calls")
    if calls:
        if not isinstance(calls, list | tuple):
            raise DataError(
                f"`{place}.tool_calls` is a {type(calls).__name__}, but it must be a list of calls."
            )
        places = (f"{place}.tool_calls[{number}]" for number in range(len(calls)))
        return [read_call(call, where, has_loss=has_loss) for call, where in zip(calls, places, strict=True)]
    call = item.get("function_call")
    return [read_call(call, f"{place}.function_call", has_loss=has_loss)] if call else []


def read_call(call: object, place: str, *, has_loss: bool = True) -> Message:
    """Return the message of one call.

    Args:
        call: an object with ``name`` and ``arguments`` (or ``parameters``), bare or in ``function``, or its
            JSON.
        place: where it stands, for errors.
        has_loss: whether training learns it.

    Raises:
        DataError: no name, or arguments that are no object.
    """
    call = parsed(call)
    if isinstance(call, Mapping) and "function" in call:
        call, place = call["function"], f"{place}.function"
    name = call.get("name") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(name, str) or not name.strip():
        raise DataError(f"`{place}.name` is missing. A call of a tool needs its name and its arguments.")
    key = "arguments" if "arguments" in call else "parameters"
    return call_message(name, call.get(key), f"{place}.{key}", has_loss=has_loss)


def call_message(name: str, arguments: object, place: str, *, has_loss: bool = True) -> Message:
    """Return the message that calls a tool with arguments.

    Raises:
        DataError: the arguments are no object, or the name is not one line.
    """
    arguments = {} if arguments is None or arguments == "" else parsed(arguments)
    if not isinstance(arguments, Mapping):
        raise DataError(
            f"`{place}` is {str(arguments)[:40]!r}, but must be a JSON object, arguments by name. Correct it."
        )
    if "\n" in name.strip():
        raise DataError(f"`{place}`: the tool's name is {name!r}, but it must be one line. Correct it.")
    text = json.dumps(arguments, ensure_ascii=False)
    return Message("assistant", text, name.strip(), is_call=True, has_loss=has_loss)


def parsed(value: object) -> object:
    """Return what a string holds as JSON; anything else, and text that is no JSON, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
