"""How settings classes describe their fields, and how untyped configuration becomes one of them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import reprlib
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from glmtune.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from pydantic import TypeAdapter

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


STRENGTH_HELP = "how much the prefix counts: 1 as tuned, 0 not at all"
SCALE_HELP = "what the LoRA is multiplied by: 1 as tuned, 0 the base"
"""Help of the settings `prefix_strength` and `adapter_scale`, which several commands have."""


def check_strength(path: str, value: object) -> float:
    """Raise ConfigError for what is no strength of a prefix and no scale of a LoRA.

    Args:
        path: the setting's or argument's path as the user writes it.
        value: what was given.

    Returns:
        The same as a float.

    Raises:
        ConfigError: not a number, negative or not finite.
    """
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ConfigError(
            f"`{path}` is {value!r:.40}, but it must be a number from 0 (the base alone) on; 1 is as"
            " tuned. Give such a number, as 0.5."
        )
    return number


def check_strengths(
    *, prefix: object, prefix_strength: object, adapter: object, adapter_scale: object, path: str = "{}_path"
) -> None:
    """Raise ConfigError for a strength without a prefix, a scale without a LoRA, and what is neither.

    Args:
        prefix: the prefix, None for none.
        prefix_strength: as given.
        adapter: the LoRA, None for none.
        adapter_scale: as given.
        path: how ``prefix`` and ``adapter`` are given.

    Raises:
        ConfigError: see above.
    """
    for name, tuned, of, value in (
        ("prefix_strength", prefix, "prefix", prefix_strength),
        ("adapter_scale", adapter, "adapter", adapter_scale),
    ):
        if check_strength(name, value) != 1 and tuned is None:
            raise ConfigError(
                f"`{name}` is {value}, but no {of} is given that it could be of. Add `{path.format(of)}=RUN`,"
                f" or leave `{name}` out."
            )


@functools.cache
def type_hints(schema: type) -> Mapping[str, Any]:
    """Return the resolved annotations of a settings class, in field order."""
    return typing.get_type_hints(schema)


def nested_settings(annotation: Any) -> type | None:
    """Return the settings class inside an annotation (``X``, ``X | None``), or None."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


_references: dict[str, tuple[object, object]] = {}
# By path of a setting: how it was given, such as `${oc.env:TOKEN}`, and what that stood for. One table, as a
# process runs one command: the settings themselves hold nothing but the values that a run uses.


def remember_references(settings: Any, given: Mapping[str, object]) -> None:
    """Keep how settings were given that take their value from the environment.

    Args:
        settings: the settings object of this process's command, values in place.
        given: path of a setting to the text (or list) that refers to the environment.
    """
    _references.clear()
    for path, text in given.items():
        value: object = dataclasses.asdict(settings)
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        _references[path] = text, value


def as_given(path: str, value: Any) -> Any:
    """Return the reference that a value came from, for files; secrets of the environment stay out of them.

    Args:
        path: of the setting.
        value: that a run uses.

    Returns:
        Such as ``${oc.env:TOKEN}``; the value itself where it was given as such, or is another one by now.
    """
    text, meant = _references.get(path, (value, value))
    return text if meant == value else value


def as_written(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return settings as a file may hold them: ``--settings FILE`` resolves references once more.

    Args:
        values: all settings, nested plain values.
        path: of the group that they are, with a dot behind it.

    Returns:
        The same with `as_given` for every value; a text that only looks like a reference is marked as none.
    """
    written: dict[str, Any] = {}
    for name, value in values.items():
        given = as_given(f"{path}{name}", value)
        if given is not value:
            written[name] = given
        elif isinstance(value, Mapping):
            written[name] = as_written(value, f"{path}{name}.")
        elif isinstance(value, list):
            written[name] = [without_reference(item) for item in value]
        else:
            written[name] = without_reference(value)
    return written


def without_reference(value: Any) -> Any:
    """Escape ``${`` as OmegaConf reads it back: a backslash before it, those before that doubled."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _unknown_keys(schema: type, values: Mapping[str, Any], path: str) -> list[str]:
    hints = type_hints(schema)
    problems: list[str] = []
    for name, value in values.items():
        key = str(name)  # YAML has keys of other types, too
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


@functools.cache
def _adapter(schema: type[Settings]) -> TypeAdapter[Settings]:
    """Return what checks values of a schema: pydantic takes longer to make it than to use it many times."""
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


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
    from pydantic import ValidationError

    if not isinstance(values, Mapping):
        raise ConfigError(f"Settings must be names with values, but they are {reprlib.repr(values)}.")
    problems = _unknown_keys(schema, values, "")
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        return _adapter(schema).validate_python(dict(values))
    except ValidationError as error:
        lines = []
        for item in error.errors():
            place = ".".join(str(part) for part in item["loc"])
            lines.append(f"`{place}` is {reprlib.repr(item['input'])}: {item['msg'].lower()}.")
        raise ConfigError("\n".join(lines)) from None
