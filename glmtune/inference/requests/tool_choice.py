"""Which tool an answer has to call, as OpenAI's ``tool_choice`` says it.

A named tool can be obeyed: its name is written at the beginning of the answer, and the model goes on with the
arguments. That some tool must be called, of several, cannot: the model may always answer in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glmtune.errors import ConfigError, unknown_name
from glmtune.models.templates.tool_calls import described


def tool_to_call(tools: Sequence[Mapping[str, Any]], choice: object) -> tuple[bool, str]:
    """Say what OpenAI's ``tool_choice`` means for the prompt.

    Args:
        tools: descriptions of what was offered, in OpenAI's form or bare.
        choice: ``none``, ``auto`` (also None), ``required``, or an object that names a function.

    Returns:
        Whether tools are announced, and the name of the one that has to be called (empty: the model decides).

    Raises:
        ConfigError: the choice cannot be obeyed, or is none.
    """
    names = [str(described(tool).get("name")) for tool in tools]
    if choice is None or choice in ("auto", "none"):
        return bool(tools) and choice != "none", ""
    if choice == "required":
        if len(names) == 1:
            return True, names[0]
        raise ConfigError(
            f"`tool_choice` is `required` with {len(names)} tools, but only the model decides between"
            ' several. Name one ({"type": "function", "function": {"name": ...}}), offer one, or use `auto`.'
        )
    name = described(choice).get("name") if isinstance(choice, Mapping) else None
    if not isinstance(name, str):
        raise ConfigError(
            f"`tool_choice` is {str(choice)[:60]!r}, but it must be `none`, `auto`, `required` or"
            ' {"type": "function", "function": {"name": ...}}.'
        )
    if not names:
        raise ConfigError(
            f"`tool_choice` names the function `{name[:60]}`, but `tools` offers none. Describe it in"
            " `tools`, or leave `tool_choice` out."
        )
    if name not in names:
        raise ConfigError(unknown_name("`tool_choice.function.name`", name, names))
    return True, name
