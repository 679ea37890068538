"""How settings classes describe their fields, and how untyped configuration becomes one of them."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from glmtune.errors import ConfigError, unknown_name

Settings = TypeVar("Settings")


def setting(default: Any, help: str) -> Any:
    """Declare a field of a settings class.

    Args:
        default: its default; a callable is used as a factory (lists, nested settings).
        help: one line for `--help`, with the unit.

    Returns:
        A dataclass field carrying the help text.
    """
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def check_choice(path: str, value: str, valid: Iterable[str]) -> None:
    """Raise ConfigError unless ``value`` is one of ``valid``.

    Args:
        path: the setting's path as the user writes it, such as ``prefix.init``.
        value: what was given.
        valid: the names allowed.

    Raises:
        ConfigError: with the valid names, nearest first.
    """
    names = list(valid)
    if value not in names:
        raise ConfigError(unknown_name(f"`{path}`", value, names))


def check_range(path: str, value: float, *, low: float | None = None, high: float | None = None) -> None:
    """Raise ConfigError unless ``low <= value <= high``.

    Args:
        path: the setting's path as the user writes it.
        value: what was given.
        low: smallest value allowed, if any.
        high: largest value allowed, if any.

    Raises:
        ConfigError: with the rule and the value.
    """
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        rule = (
            f"at least {low}"
            if high is None
            else f"at most {high}"
            if low is None
            else f"from {low} to {high}"
        )
        raise ConfigError(f"`{path}` is {value}, but it must be {rule}.")


def type_hints(schema: type) -> dict[str, Any]:
    """Return the resolved annotations of a settings class, in field order."""
    return typing.get_type_hints(schema)


def nested_settings(annotation: Any) -> type | None:
    """Return the settings class inside an annotation (``X``, ``X | None``), or None."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _unknown_keys(schema: type, values: Mapping[str, Any], path: str) -> list[str]:
    hints = type_hints(schema)
    problems: list[str] = []
    for key, value in values.items():
        here = f"{path}{key}"
        if key not in hints:
            near = difflib.get_close_matches(key, list(hints), n=1)
            guess = f" Did you mean `{path}{near[0]}`?" if near else ""
            problems.append(f"`{here}` is no setting.{guess} Settings here: {', '.join(hints)}.")
            continue
        inner = nested_settings(hints[key])
        if inner is not None and isinstance(value, Mapping):
            problems += _unknown_keys(inner, value, f"{here}.")
    return problems


def build_settings(schema: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Turn nested plain values into a settings object, reporting every problem at once.

    Args:
        schema: a frozen dataclass, its nested groups dataclasses too.
        values: plain values, as read from YAML.

    Returns:
        An instance of ``schema``; its ``__post_init__`` checks have run.

    Raises:
        ConfigError: unknown keys (with the nearest valid one) or wrong types, all of them listed.
    """
    from pydantic import TypeAdapter, ValidationError

    problems = _unknown_keys(schema, values, "")
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        return TypeAdapter(schema).validate_python(dict(values))
    except ValidationError as error:
        lines = []
        for item in error.errors():
            place = ".".join(str(part) for part in item["loc"])
            lines.append(f"`{place}` is {item['input']!r}: {item['msg'].lower()}.")
        raise ConfigError("\n".join(lines)) from None
