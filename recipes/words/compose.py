"""From a command line to a settings object: Hydra composes the YAML tree, the schema checks it."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtune.errors import ConfigError, unknown_name
from glmtune.settings import build_settings, nested_settings, remember_references, type_hints
from recipes.words.command import (
    Command,
    config_dir,
    config_groups,
    default_values,
    group_options,
    setting_rows,
)
from recipes.words.reading import SHORT_NAMES, read_words, unknown_setting
from recipes.words.several import first_of_each, take_apart, words_over
from recipes.words.values import quoted, written

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = [
    "Command",
    "compose",
    "compose_as_given",
    "config_dir",
    "config_groups",
    "default_values",
    "given_settings",
    "load_settings",
    "long_forms",
    "read_settings",
    "setting_rows",
    "take_apart",
    "words_over",
]
TENSOR_PLACES = ("output_dir", "prefix_path", "adapter_path", "init_from", "source")
# What else a group takes than its options.
PLACES = {
    "model": " A folder is one, too (`model=./FOLDER`), or a hub id (`model=THUDM/NAME`).",
    "data": " A file of rows is one, too: `data=FILE.jsonl`.",
    "deepspeed": " A DeepSpeed configuration is one, too: `deepspeed=FILE.json`.",
}


def compose(command: Command, overrides: Sequence[str], extra_configs: Path | None = None) -> dict[str, Any]:
    """Compose the YAML of a command with overrides into plain nested values.

    Args:
        command: which command; ``configs/<name>.yaml`` is its root.
        overrides: Hydra overrides such as ``+recipe=ptuning`` or ``trainer.max_steps=100``.
        extra_configs: a user's own tree of the same form, searched as well.

    Returns:
        Nested plain values, interpolations resolved, every setting of the schema present.

    Raises:
        ConfigError: an override cannot be parsed, or names a group option or key that does not exist.
    """
    return _resolved(_composed(command, overrides, extra_configs), command)[0]


def compose_as_given(
    command: Command, overrides: Sequence[str], extra_configs: Path | None = None
) -> dict[str, Any]:
    """Compose like `compose`, but leave what is read from the environment as it was given."""
    values, given = _resolved(_composed(command, overrides, extra_configs), command)
    for path, text in given.items():
        *groups, name = path.split(".")
        place = values
        for group in groups:
            place = place[group]
        place[name] = text
    return values


def _composed(command: Command, overrides: Sequence[str], extra_configs: Path | None) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides = long_forms(overrides, command, extra_configs)
    if command.takes_several:
        overrides = first_of_each(overrides, command, extra_configs)
    if extra_configs is not None:
        _check_yaml(extra_configs)
    # Ahead of Hydra, which answers an unknown option with the folders it searched.
    _check_keys(overrides, command, extra_configs)
    _check_group_options(overrides, command, extra_configs)
    # The schema is the base of the command's YAML, so a default stands in one place, its settings class, and
    # a key that no class has is an error.
    ConfigStore.instance().store(name=f"{command.name}_schema", node=default_values(command.schema))
    for name, inner in _optional_groups(command.schema):
        ConfigStore.instance().store(group=name, name=f"{name}_schema", node=default_values(inner))
    OmegaConf.register_new_resolver("by_size", _by_size, replace=True)
    arguments = [written(override, command) for override in _with_groups(overrides, extra_configs)]
    if extra_configs is not None:
        place = quoted(f"file://{extra_configs.resolve()}")
        arguments.append(f"hydra.searchpath=[{place}]")
    GlobalHydra.instance().clear()  # Hydra composes once a process; `plan` and tests do so several times
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3", job_name="glmtune"):
            return hydra_compose(command.name, overrides=arguments)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(str(error), command)) from error


def long_forms(overrides: Sequence[str], command: Command, extra_configs: Path | None = None) -> list[str]:
    """Turn other names into settings before Hydra sees them, whose messages would name what nobody typed.

    The command line has done so already; overrides stay what they are.
    """
    words = read_words(overrides, command, extra_configs).overrides
    return [_model_setting(override, command) for override in words]


def given_settings(command: Command, overrides: Sequence[str]) -> frozenset[str]:
    """Return the paths of the settings that a command line names one by one; a group's option names none.

    Args:
        command: which command.
        overrides: as for `compose`.
    """
    keys = {override.lstrip("+~").partition("=")[0] for override in long_forms(overrides, command)}
    return frozenset(keys & {path for path, _, _ in setting_rows(command.schema)})


def _resolved(composed: DictConfig, command: Command) -> tuple[dict[str, Any], dict[str, object]]:
    """Turn a configuration into plain values: nothing below this file knows OmegaConf.

    Returns:
        All values, and those that come from the environment as they were given, by path.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(composed, resolve=True)
        given = _from_environment(composed)
        missing = sorted(OmegaConf.missing_keys(composed))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(str(error), command)) from error
    if missing:
        raise ConfigError(f"`{missing[0]}` must be given: add `{missing[0]}=VALUE`.")
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}, given


def _from_environment(composed: DictConfig) -> dict[str, object]:
    """Find the settings whose value comes from the environment, also by way of others or inside a text.

    Each setting with a reference is resolved once more, alone, and the resolver of ``${oc.env:NAME}``, the
    only one that reads the environment, is watched meanwhile.
    """
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    asked: list[str] = []

    def watched(key: str, *default: Any) -> str | None:
        asked.append(key)
        return oc.env(key, *default)

    OmegaConf.register_new_resolver("oc.env", watched, replace=True)
    try:
        found: dict[str, object] = {}
        for path, text in _references(OmegaConf.to_container(composed, resolve=False)):
            asked.clear()
            node: Any = composed
            for part in path.split("."):
                node = node[part]
            if OmegaConf.is_config(node):
                OmegaConf.to_container(node, resolve=True)
            if asked:
                found[path] = text
        return found
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _references(values: Any, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield path and unresolved text (or list) of the settings that hold ``${``."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _references(value, f"{path}{name}.")
        elif "${" in str(value):
            yield f"{path}{name}", value


def _by_size(tiny: Any, large: Any, *, _root_: Any) -> Any:
    """Resolve ``${by_size:TINY,LARGE}``: a recipe's value for glm-tiny, and for all other models."""
    return tiny if _root_.model.source == "glm-tiny" else large


def _model_setting(override: str, command: Command) -> str:
    """Let ``quantization=int4`` and the official ``quantization_bit=4`` stand for those of the model."""
    key = override.partition("=")[0]
    return f"model.{override}" if key in SHORT_NAMES and f"model.{key}" in command.types else override


def _optional_groups(schema: type) -> Iterator[tuple[str, type]]:
    """Yield settings that are null until their config group is chosen; its YAML takes NAME_schema as base."""
    hints = type_hints(schema)
    for field in dataclasses.fields(schema):
        inner = nested_settings(hints[field.name])
        if inner is not None and field.default is None:
            yield field.name, inner


def _with_groups(overrides: list[str], extra_configs: Path | None) -> list[str]:
    """Let one setting of a group that is null by default stand for the group: ``deepspeed.NAME=...``.

    What a recipe has chosen stays chosen (``+recipe=kto preference.beta=0.2``).
    """
    keys = [override.partition("=")[0].lstrip("+") for override in overrides]
    recipes = [override.partition("=")[2] for override in overrides if override.startswith("+recipe=")]
    for group, option in {"deepspeed": "zero2", "retain": "normal", "preference": "dpo"}.items():
        if group in keys or not any(key.startswith(f"{group}.") for key in keys):
            continue
        if group not in _chosen_by(recipes, extra_configs):
            overrides = [f"{group}={option}", *overrides]
    return overrides


def _chosen_by(recipes: Sequence[str], extra_configs: Path | None) -> set[str]:
    """Return the groups of which recipes, and those that they build on, choose an option."""
    import yaml

    from glmtune.storage.yaml_text import read_yaml

    roots = [config_dir(), *([extra_configs] if extra_configs else [])]
    chosen, pending, seen = set[str](), list(recipes), set[str]()
    while pending:
        recipe = pending.pop()
        file = next((path for root in roots if (path := root / "recipe" / f"{recipe}.yaml").is_file()), None)
        if file is None or recipe in seen:
            continue
        seen.add(recipe)
        try:
            content = read_yaml(file)
        except (OSError, yaml.YAMLError):  # Hydra says what is wrong with it
            continue
        items = content.get("defaults") if isinstance(content, dict) else None
        for item in items if isinstance(items, list) else []:
            if isinstance(item, dict):
                chosen |= {
                    key.split()[-1].lstrip("/") for key in item if isinstance(key, str) and key.strip()
                }
            else:
                pending.append(str(item))
    return chosen


def load_settings(command: Command, overrides: Sequence[str], extra_configs: Path | None = None) -> Any:
    """Compose and check: the settings object of a command line.

    Raises:
        ConfigError: see ``compose`` and ``glmtune.settings.build_settings``.
    """
    return _built(_composed(command, overrides, extra_configs), command)


def read_settings(command: Command, file: Path) -> Any:
    """Read all settings from a file: those of an earlier run, or that a launcher hands to its processes.

    Args:
        command: which command.
        file: YAML or JSON, such as a run's ``config.yaml``; ``${oc.env:NAME}`` in it is resolved.

    Raises:
        ConfigError: it cannot be read, or see ``load_settings``.
    """
    try:
        composed = _read(file)
    except ValueError as error:
        raise ConfigError(
            f"`--settings` must be followed by a file such as a run's config.yaml, but `{file}` cannot be"
            f" read ({error})."
        ) from error
    return _built(composed, command)


def read_values(command: Command, file: Path) -> dict[str, Any]:
    """Read the settings of a run, also of another command's, as nested plain values; they are not checked.

    Args:
        command: which command asks, for messages.
        file: the run's ``config.yaml``; ``${oc.env:NAME}`` in it is resolved.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return _resolved(_read(file), command)[0]
    except ValueError as error:
        raise ConfigError(f"`{file}` cannot be read as the settings of a run ({error}).") from error


def _read(file: Path) -> DictConfig:
    """Read settings from a file.

    Raises:
        ValueError: it cannot be read.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from glmtune.storage.yaml_text import read_yaml

    try:
        values = read_yaml(file)
        if not isinstance(values, dict):
            raise yaml.YAMLError("it does not hold names with values")
        return OmegaConf.create(values)
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(str(error)) from error


def _built(composed: DictConfig, command: Command) -> Any:
    values, given = _resolved(composed, command)
    settings = build_settings(command.schema, values)
    _check_places(values)
    remember_references(settings, given)
    return settings


def _check_places(values: dict[str, Any], path: str = "") -> None:
    """Refuse folders of tensors whose names are not UTF-8, which neither safetensors nor TensorBoard opens.

    Names are bytes to Linux, and Python writes them in the encoding of the locale.
    """
    for name, value in values.items():
        if isinstance(value, dict):
            _check_places(value, f"{path}{name}.")
        elif name in TENSOR_PLACES and isinstance(value, str) and not _is_named_in_utf8(value):
            raise ConfigError(
                f"`{path}{name}` is `{value}`, but model files are only opened under names in UTF-8, and this"
                f" one is written otherwise ({sys.getfilesystemencoding()}). Use an ASCII name, or UTF-8"
                " throughout: `export LC_ALL=C.UTF-8` (or another UTF-8 locale)."
            )


def _is_named_in_utf8(path: str) -> bool:
    try:
        return os.fsencode(path) == path.encode("utf-8", "surrogatepass")
    except UnicodeEncodeError:  # the locale has no such character
        return False


def _check_yaml(folder: Path) -> None:
    """Refuse configurations that grow beyond measure: Hydra would copy all that an alias stands for.

    Whatever else is wrong in them is Hydra's to say, of those that it reads.
    """
    import yaml

    from glmtune.storage.yaml_text import YamlTooLarge, read_yaml

    for pattern in ("*.yaml", "*/*.yaml", "*/*/*.yaml"):  # of groups, and groups inside them
        for file in sorted(folder.glob(pattern)):
            try:
                read_yaml(file)
            except YamlTooLarge as error:
                raise ConfigError(f"{file}: {error}.") from None
            except (OSError, yaml.YAMLError):
                continue


def _check_keys(overrides: Sequence[str], command: Command, extra: Path | None) -> None:
    """Refuse settings that do not exist, where Hydra would speak of structs, or its lexer of characters."""
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~").partition("@")[0]
        is_known = key in command.types or key in command.sections or key in command.groups
        is_own_group = extra is not None and (extra / key).is_dir()
        if not (is_known or is_own_group or key.startswith("hydra.")):
            raise unknown_setting(key, command)


def _check_group_options(overrides: Sequence[str], command: Command, extra: Path | None) -> None:
    for override in overrides:
        group, _, option = override.lstrip("+").partition("=")
        group = group.partition("@")[0]
        if (
            group not in command.groups
            or option == "null"
            or option[:1] in ("'", '"', "{", "[", "$", "/", "")
        ):
            continue
        options = group_options(group, extra)
        is_there = any((root / group / f"{option}.yaml").is_file() for root in (config_dir(), extra) if root)
        if option not in options and not is_there:
            raise ConfigError(unknown_name(f"`{group}`", option, options) + PLACES.get(group, ""))


def _explain(message: str, command: Command) -> str:
    """Reword Hydra's messages: say which key is meant, and the nearest one that exists."""
    if message.startswith("Recursive interpolation"):
        return f"A setting of `glmtune {command.name}` refers to itself by `${{...}}`. Give it a value."
    if unset := re.search(r"Environment variable '([^']+)' not found", message):
        place = re.search(r"full_key: (\S+)", message)
        what = f"`{place[1]}`" if place else "a setting"
        return f"{what} is to be read from the environment variable `{unset[1]}`, which is not set. Set it."
    absent = re.search(r"Interpolation key '([^']*)' not found", message)
    if absent := absent or re.search(r"Unsupported interpolation type ([^\s]*)", message):
        return (
            f"`${{{absent[1]}...}}` refers to no setting that exists. Where it is meant as text, write a"
            f" backslash in front: `\\${{{absent[1]}...}}`."
        )
    unknown = re.search(r"Could not override '([^']+)'", message) or re.search(
        r"Key '([^']+)' is not in struct", message
    )
    first_line = message.strip().splitlines()[0]
    if unknown is None:
        return f"{first_line} Overrides look like `trainer.max_steps=100` or `data=ads`."
    key = unknown[1]
    return str(unknown_setting(key, command))
