"""So much of Go's text/template as our Modelfiles use, to see what Ollama makes of them.

Source:
    https://pkg.go.dev/text/template
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_WORD = re.compile(r'"[^"]*"|\S+')


def render_go(template: str, messages: Sequence[tuple[str, str]]) -> str:
    """Render as Ollama does: `.Messages`, `.System` (all system messages), `.Prompt` (the last question).

    Args:
        template: text between the quotes of a Modelfile.
        messages: pairs of Ollama's role and content.
    """
    data = {
        "Messages": [{"Role": role, "Content": content} for role, content in messages],
        "System": "\n\n".join(content for role, content in messages if role == "system"),
        "Prompt": next((content for role, content in reversed(messages) if role == "user"), ""),
    }
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    out, place = _run(parts, 0, data, {})
    assert place == len(parts), "an `end` without its beginning"
    return out


def _run(parts: list[str], place: int, dot: Any, variables: dict[str, str]) -> tuple[str, int]:
    """Render from a place on, up to the `end` or `else` that belongs to an outer action."""
    out = ""
    while place < len(parts):
        if place % 2 == 0:
            out += parts[place]
            place += 1
            continue
        action = parts[place]
        if action == "end" or action.startswith("else"):
            return out, place
        place += 1
        if action.startswith("range "):
            body = place
            for item in _value(action.split()[1], dot, variables):
                text, _ = _run(parts, body, item, variables)
                out += text
            place = _skip(parts, body) + 1
        elif action.startswith("if "):
            text, place = _if(parts, place, action.removeprefix("if "), dot, variables)
            out += text
        elif (match := re.fullmatch(r"(\$\w+) :?= (.+)", action)) is not None:
            variables[match[1]] = _value(match[2], dot, variables)
        else:
            out += str(_value(action, dot, variables))
    return out, place


def _if(parts: list[str], place: int, condition: str, dot: Any, variables: dict[str, str]) -> tuple[str, int]:
    taken, out = False, ""
    while True:
        if not taken and _value(condition, dot, variables):
            out, place = _run(parts, place, dot, variables)
            taken = True
        else:
            place = _skip(parts, place)
        action = parts[place]
        place += 1
        if action == "end":
            return out, place
        condition = action.removeprefix("else").strip().removeprefix("if ") or "true"


def _skip(parts: list[str], place: int) -> int:
    """Return the place of the `end` or `else` that ends what begins at a place."""
    depth = 0
    for at in range(place + (place % 2 == 0), len(parts), 2):
        action = parts[at]
        if depth == 0 and (action == "end" or action.startswith("else")):
            return at
        depth += action.startswith(("if ", "range ")) - (action == "end")
    raise AssertionError("an action without its end")


def _value(expression: str, dot: Any, variables: dict[str, str]) -> Any:
    words = _WORD.findall(expression)
    if len(words) == 1:
        word = words[0]
        if word.startswith('"'):
            return word[1:-1]
        if word == "true":
            return True
        return variables[word] if word.startswith("$") else dot[word.removeprefix(".")]
    name, *given = words
    values = [_value(word, dot, variables) for word in given]
    if name == "eq":
        return values[0] == values[1]
    if name == "len":
        return len(values[0].encode())
    assert name == "printf", name
    return values[0] % tuple(values[1:])
