"""Settings with several values, as Hydra's multirun has them: ``a=1,2``, ``range(1,9)``, ``interval(0,1)``.

Hydra's own parser reads them, so whatever its users know means the same here. Two things are added: a text
that its grammar has no letters for (`训练集.jsonl,b.jsonl`) is parted at its commas all the same, and the
values of a setting may stand in a list (`sweep.over`), as files write them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glmtune.errors import ConfigError
from glmtune.sweep.space import Axis, Choices, Interval
from recipes.words.command import Command, group_options
from recipes.words.values import at_commas, literal, parsed_override, quoted


def take_apart(
    words: Sequence[str], command: Command, extra_configs: Path | None = None
) -> tuple[list[str], list[Axis]]:
    """Part the settings of a command line into those with one value and those with several.

    Args:
        words: overrides under our names, see ``read_words``; of two for one setting the later holds.
        command: which command.
        extra_configs: a user's own config tree, whose options `glob()` sees too.

    Returns:
        Overrides with one value, and the settings with several, each in the order typed.

    Raises:
        ConfigError: a setting has the same value twice, no value, or an interval without width.
    """
    last = {_name(word): word for word in words}
    fixed: list[str] = []
    axes: list[Axis] = []
    for name, word in last.items():
        axis = _axis(word, name, command, extra_configs)
        if axis is None:
            fixed.append(word)
        else:
            axes.append(axis)
    return fixed, axes


def first_of_each(words: Sequence[str], command: Command, extra_configs: Path | None = None) -> list[str]:
    """Return overrides with one value each: of several the first, of an interval its lower end."""
    return [
        word if axis is None else f"{axis.key}={axis.first}"
        for word in words
        for axis in (_axis(word, _name(word), command, extra_configs),)
    ]


def words_over(over: Mapping[str, Any]) -> list[str]:
    """Write the settings of `sweep.over` as words.

    Args:
        over: a list of values by setting, or a text in Hydra's grammar such as ``interval(0, 1)``;
            settings may stand in their groups, as in a run's ``config.yaml``.

    Raises:
        ConfigError: a value that is neither.
    """
    words: list[str] = []
    for name, values in _flat(over):
        if isinstance(values, list) and values:
            words.append(f"{name}={','.join(map(_element, values))}")
        elif isinstance(values, str):
            words.append(f"{name}={values}")
        else:
            raise ConfigError(
                f"`sweep.over` has {values!r} for `{name}`, but it takes a list of values, `[1e-3,2e-2]`, or"
                " a text such as `'interval(1e-4,1e-1)'`. One value is given as a setting of its own:"
                f" `{name}=VALUE`."
            )
    return words


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _element(value: Any) -> str:
    """Write one value of a list, unquoted where it is read back as the text that it is."""
    if not isinstance(value, str):
        return literal(value)
    found = parsed_override(f"value={value}")
    is_read = found is not None and not found.is_sweep_override() and found.value() == value
    return value if is_read else quoted(value)


def _name(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _axis(word: str, name: str, command: Command, extra_configs: Path | None) -> Axis | None:
    """Return the several values of one override; None where it has one."""
    key, equals, value = word.partition("=")
    if not equals:
        return None
    override = parsed_override(word)
    if override is None:
        items = [item.strip() for item in at_commas(value)]
        # What the grammar cannot read is a text, which may hold anything but a comma.
        return (
            _choices(key, [item if _reads(item) else quoted(item) for item in items]) if items[1:] else None
        )
    if not override.is_sweep_override():
        return None
    if override.is_interval_sweep():
        return _interval(key, override.value())
    if hasattr(override.value(), "filter"):  # glob(): the options of a group
        there = group_options(name, extra_configs)
        if not there:
            raise ConfigError(
                f"`{word}` is to choose among options, but `{name}` is no group. List its values."
            )
        options = override.value().filter(there)
        if not options:
            raise ConfigError(f"`{word}` matches none of {', '.join(there)}.")
        return _choices(key, options)
    return _choices(key, [_written(element) for element in override.sweep_iterator()])


def _reads(text: str) -> bool:
    return parsed_override(f"value={text}") is not None


def _written(element: Any) -> str:
    """Write one of several values as it is typed alone."""
    if hasattr(element, "with_quotes"):
        return str(element.with_quotes())
    return _element(element)


def _choices(key: str, values: Sequence[str]) -> Choices:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ConfigError(
            f"`{key}` is to take {', '.join(twice)} more than once, but every value makes points of its own."
            " Name each once; `sweep.repeats=3` trains every point with several seeds."
        )
    if not values:
        raise ConfigError(f"`{key}` is given no value: a range must hold at least one, as `range(1,4)` does.")
    return Choices(key, tuple(values))


def _interval(key: str, found: Any) -> Interval:
    is_int, is_log = isinstance(found.start, int) and isinstance(found.end, int), "log" in found.tags
    if unknown := sorted(found.tags - {"log"}):
        raise ConfigError(f"`{key}` has the tag `{unknown[0]}`, but an interval knows `log` only.")
    if not found.start < found.end or (is_log and found.start <= 0):
        rule = "its lower end must be above 0" if is_log else "its ends must be apart"
        raise ConfigError(
            f"`{key}` is the interval from {found.start:g} to {found.end:g}, but {rule}: write"
            " `interval(LOW,HIGH)`, or `tag(log,interval(1e-4,1e-1))`."
        )
    return Interval(key, found.start, found.end, is_int=is_int, is_log=is_log)
