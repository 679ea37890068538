"""What a command is, and which settings and config groups it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import glmtune
from glmtune.settings import nested_settings, type_hints

PACKAGE = Path(glmtune.__file__).resolve().parent


@dataclass(frozen=True)
class Command:
    """One `glmtune` command.

    Attributes:
        name: the word typed, also the name of its YAML file.
        summary: one line for `--help`.
        schema: root settings class, a frozen dataclass.
        run: what the command does with its settings.
        bare_words: settings that the first words without `=` stand for, in their order.
        examples: command lines shown by `--help`.
        takes_words: `run` is given the overrides as typed, too.
        takes_several: settings may have several values each, of which those that `run` is given hold the
            first; it is given the overrides, too, and the folder of `--config-dir`.
    """

    name: str
    summary: str
    schema: type
    run: Callable[..., Any]
    bare_words: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    takes_words: bool = False
    takes_several: bool = False

    @cached_property
    def types(self) -> dict[str, Any]:
        """Return the type of every setting, by path."""
        return dict(_types(self.schema))

    @cached_property
    def sections(self) -> frozenset[str]:
        """Return the paths of settings that hold settings, such as ``trainer``."""
        parts = (path.split(".")[:-1] for path in self.types)
        return frozenset(".".join(part[: end + 1]) for part in parts for end in range(len(part)))

    @property
    def groups(self) -> list[str]:
        """Return the config groups whose options the command takes."""
        return [name for name in config_groups() if name in self.sections or name == "recipe"]


def config_dir() -> Path:
    """Return the folder of the Hydra tree, in a checkout and in an installed wheel alike."""
    installed = PACKAGE / "_configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def group_options(group: str, extra: Path | None = None) -> list[str]:
    """Return the names that ``group=NAME`` accepts, sorted.

    Args:
        group: a folder of the config tree, such as ``recipe``.
        extra: a user's own config tree, searched too.
    """
    roots = [config_dir(), *([extra] if extra else [])]
    return sorted({file.stem for root in roots for file in (root / group).glob("*.yaml")})


def config_groups() -> dict[str, list[str]]:
    """Return every config group with its options."""
    names = sorted(folder.name for folder in config_dir().iterdir() if folder.is_dir())
    return {name: options for name in names if (options := group_options(name))}


def default_values(schema: type) -> dict[str, Any]:
    """Return the nested defaults of a schema as plain values; ``???`` where there is none."""
    hints = type_hints(schema)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        inner = nested_settings(hints[field.name])
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif inner is not None:
            values[field.name] = default_values(inner)
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
        else:
            values[field.name] = "???"
    return values


def setting_rows(schema: type, path: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (path, default, help) for every setting of a schema, depth first."""
    hints, defaults = type_hints(schema), default_values(schema)
    for field in dataclasses.fields(schema):
        inner = nested_settings(hints[field.name])
        if inner is not None:
            yield from setting_rows(inner, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", defaults[field.name], field.metadata.get("help", "")


def _types(schema: type, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, annotation in type_hints(schema).items():
        inner = nested_settings(annotation)
        if inner is not None:
            yield from _types(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}", annotation
