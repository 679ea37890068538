"""The names under which a conversation or a client asks for what was tuned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from glmtune.errors import ConfigError

Named = Mapping[str, str] | Sequence[str] | str | None
"""Adapters as settings give them: names with paths, several paths, one path, none."""
NAME = re.compile(r"\w[\w.-]{0,63}")
"""A name of an adapter: it stands in addresses and logs."""
_OF_RUNS = re.compile(r"last|best|checkpoint-[0-9]+")


def named_paths(setting: str, given: Named) -> dict[str, str]:
    """Return paths by name.

    Args:
        setting: such as ``prefix_path``, for messages.
        given: what it is.

    Returns:
        Names given or derived: the run's folder, or the file's.

    Raises:
        ConfigError: a name that cannot stand in an address, or two alike.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        pairs = [(str(name), str(path)) for name, path in given.items()]
    else:
        paths = [given] if isinstance(given, str) else list(given)
        pairs = [(derived_name(path), path) for path in paths]
    named: dict[str, str] = {}
    for name, path in pairs:
        way = f"Name it: `{setting}={{NAME:PATH}}`"
        if path.startswith("{"):
            raise ConfigError(
                f"`{setting}` is `{path}`, which cannot be read as names with paths. Put paths with other"
                f' characters than letters of ASCII, digits, `/`, `-`, `_` and `.` in quotes: "{setting}='
                "{style:'PATH'}\"."
            )
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"`{setting}` names `{name}`, but a name must have 1 to 64 letters, digits, `_`, `-` and `.`,"
                f" and begin with a letter, a digit or `_`. {way}."
            )
        if name in named:
            raise ConfigError(
                f"`{setting}` has two adapters of the name `{name}`: {named[name]} and {path}. {way}."
            )
        named[name] = path
    return named


def tuned_paths(prefix_path: Named, adapter_path: Named) -> tuple[dict[str, str], dict[str, str]]:
    """Return the paths of prefixes and of LoRAs by name.

    Args:
        prefix_path: the setting of that name.
        adapter_path: the setting of that name.

    Raises:
        ConfigError: see `named_paths`; a prefix and a LoRA have one name.
    """
    prefixes, adapters = named_paths("prefix_path", prefix_path), named_paths("adapter_path", adapter_path)
    if both := prefixes.keys() & adapters.keys():
        name = min(both)
        raise ConfigError(
            f"`prefix_path` and `adapter_path` both have the name `{name}`. Name one of them otherwise, such"
            f" as `prefix_path={{tuned:{prefixes[name]}}}`."
        )
    return prefixes, adapters


def derived_name(path: str) -> str:
    """Return what a run, one of its checkpoints or a file is called.

    >>> [derived_name(path) for path in ("runs/adgen", "runs/adgen/last", "runs/adgen/checkpoint-20")]
    ['adgen', 'adgen', 'adgen-checkpoint-20']
    >>> derived_name("downloads/pytorch_model.bin")
    'downloads'
    """
    place = Path(path).expanduser()
    if place.suffix in (".bin", ".safetensors", ".pt"):
        place = place.parent
    if _OF_RUNS.fullmatch(place.name):
        run = place.resolve().parent.name
        return f"{run}-{place.name}" if place.name.startswith("checkpoint-") else run
    return place.name or place.resolve().name
