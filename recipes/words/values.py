"""Write what was typed as Hydra's grammar reads it.

The grammar is made for lists, dictionaries and sweeps, and knows ASCII words only: `训练集.jsonl`,
`it's.json` and `train (1).json` end in its lexer, `a,b.jsonl` is two values to it. What it cannot read is
therefore taken literally, and so is what it would read as something else than text where a setting is one.
"""

from __future__ import annotations

import re
import types
import typing
from typing import Any

from glmtune.settings import without_reference
from recipes.words.command import Command

# Hydra would take the first of two backslashes, and the one before a parenthesis, for its own escapes.
_WINDOWS_PATH = re.compile(r"\\\\|[A-Za-z]:\\")


def quoted(text: str) -> str:
    """Write a text as Hydra reads it back, whatever characters it holds.

    A backslash counts only in front of a quote (or the end, where one follows). ``${`` that begins no
    reference is marked as plain text for OmegaConf, which reads the value next.
    """
    if not _is_readable(text):
        text = without_reference(text)
    return "'" + re.sub(r"(\\*)'|(\\+)\Z", _escaped, text) + "'"


def _escaped(match: re.Match[str]) -> str:
    return match[2] * 2 if match[2] else match[1] * 2 + "\\'"


def _is_readable(text: str) -> bool:
    """Whether every ``${`` begins a reference, or is marked as plain text."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        OmegaConf.create({"text": text})
    except OmegaConfBaseException:
        return False
    return True


def written(override: str, command: Command) -> str:
    """Return an override whose value Hydra reads as it was meant.

    Args:
        override: `setting=value`, the value as typed.
        command: its schema says which settings are text, and which lists.

    Returns:
        The same, the value quoted where it must be. Lists, dictionaries and quoted texts stay what they are.
    """
    key, equals, value = override.partition("=")
    if not equals:
        return override
    name = key.lstrip("+~")
    kinds = {str} if name in command.groups else _kinds(command.types.get(name))
    if list in kinds and (items := _list_items(value, takes_text=str in kinds)) is not None:
        return f"{key}=[{','.join(map(_text, items))}]"
    return f"{key}={_text(value) if str in kinds else _any(value)}"


def _kinds(annotation: Any) -> set[Any]:
    """Return what a value may be: `list[str] | None` is a list or None."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    return {typing.get_origin(member) or member for member in members}


def parsed_override(override: str) -> Any:
    """Return what Hydra's grammar makes of an override, or None where it cannot read it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(override)
    except (HydraException, RecursionError):
        return None


def _parsed(value: str) -> Any:
    """Return what Hydra reads, or None if it cannot, or reads several values (a sweep).

    Returns:
        A pair of the word "read" and the value: the value itself may be None, too.
    """
    found = parsed_override(f"value={value}")
    return None if found is None or found.is_sweep_override() else ("read", found.value())


def _text(value: str) -> str:
    """Write the value of a setting that is a text (or an item of a list of them)."""
    found = _parsed(value)
    if found is None:
        return quoted(value)
    read = found[1]
    if not isinstance(read, str):
        # 2024, 1e5 and true are names like others where a text is asked for. Quoted texts are no `str` here.
        return quoted(value) if isinstance(read, bool | int | float) else value
    is_meant_so = value == value.strip() and not _WINDOWS_PATH.match(value) and _is_readable(value)
    return value if is_meant_so else quoted(value)


def _any(value: str) -> str:
    """Write the value of a setting that is a number, say, or of none: its type is checked later, in words."""
    return value if value[:1] in ("[", "{") or _parsed(value) is not None else quoted(value)


def _list_items(value: str, *, takes_text: bool) -> list[str] | None:
    """Split the value of a setting that is a list; one value is a list of one.

    Returns:
        The items as typed; None where the value is no list: null, a reference, a dictionary, an open bracket.
    """
    found = _parsed(value)
    if found is not None and (found[1] is None or isinstance(found[1], dict) or value.startswith("${")):
        return None
    typed = value.strip()
    if typed.startswith("[") and typed.endswith("]"):
        return [item.strip() for item in at_commas(typed[1:-1])] if typed[1:-1].strip() else []
    if takes_text or typed.startswith("[") or not typed:
        return None
    return [item.strip() for item in at_commas(typed)]


def at_commas(text: str) -> list[str]:
    """Split at commas that stand in no quotes and no brackets.

    A quote opens only where an item begins: that of ``it's`` is a letter like others.
    """
    items, begin, depth, quote = [], 0, 0, ""
    for place, letter in enumerate(text):
        if quote:
            is_escaped = (place - len(text[:place].rstrip("\\"))) % 2
            quote = "" if letter == quote and not is_escaped else quote
        elif letter in "'\"" and not text[begin:place].strip():
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth <= 0:
            items.append(text[begin:place])
            begin = place + 1
    return [*items, text[begin:]]


def literal(value: Any) -> str:
    """Write a value of YAML in Hydra's grammar, its type kept."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(literal, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_key(str(key))}:{literal(item)}" for key, item in value.items()) + "}"
    return repr(value) if isinstance(value, int | float) else quoted(str(value))


def _key(text: str) -> str:
    """Write a key of a dictionary: the grammar knows none in quotes."""
    return text if re.fullmatch(r"[+\w.-]+", text, re.ASCII) else quoted(text)
