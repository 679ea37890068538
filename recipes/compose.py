"""From a command line to a settings object: Hydra composes the YAML tree, the schema checks it."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import glmtune
from glmtune.errors import ConfigError, unknown_name
from glmtune.settings import build_settings, nested_settings, type_hints

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
    """

    name: str
    summary: str
    schema: type
    run: Callable[..., Any]
    bare_words: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    takes_words: bool = False


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
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # Short forms become the words Hydra knows before it sees them: its grammar takes no slash in a group's
    # option, and its messages would name settings that nobody typed.
    overrides = [
        _several_benchmarks(_model_source(_model_setting(override, command)), command)
        for override in overrides
    ]
    # Ahead of Hydra, which answers an unknown option with the folders it searched.
    _check_group_options(overrides, extra_configs)
    # The schema is the base of the command's YAML, so a default stands in one place, its settings class, and
    # a key that no class has is an error.
    ConfigStore.instance().store(name=f"{command.name}_schema", node=default_values(command.schema))
    for name, inner in _optional_groups(command.schema):
        ConfigStore.instance().store(group=name, name=f"{name}_schema", node=default_values(inner))
    OmegaConf.register_new_resolver("by_size", _by_size, replace=True)
    arguments = [*_with_deepspeed(overrides)]
    if extra_configs is not None:
        arguments.append(f"hydra.searchpath=[file://{extra_configs.resolve()}]")
    GlobalHydra.instance().clear()  # Hydra composes once a process; `plan` and tests do so several times
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3", job_name="glmtune"):
            composed = hydra_compose(command.name, overrides=arguments)
        # Plain values from here on: nothing below this file knows OmegaConf.
        values = OmegaConf.to_container(composed, resolve=True)
        missing = sorted(OmegaConf.missing_keys(composed))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(str(error), command)) from error
    if missing:
        raise ConfigError(f"`{missing[0]}` must be given: add `{missing[0]}=VALUE`.")
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _by_size(tiny: Any, large: Any, *, _root_: Any) -> Any:
    """Resolve ``${by_size:TINY,LARGE}``: a recipe's value for glm-tiny, and for all other models."""
    return tiny if _root_.model.source == "glm-tiny" else large


def quoted(value: str) -> str:
    """Write a value as Hydra reads it back, whatever characters it holds."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _model_setting(override: str, command: Command) -> str:
    """Let ``quantization=int4`` and the official ``quantization_bit=4`` stand for those of the model."""
    key, _, value = override.partition("=")
    known = [path for path, _, _ in setting_rows(command.schema)]
    shorts = ("quantization", "quantization_bit", "quantization_activations")
    is_short = key in shorts and f"model.{key}" in known
    return f"model.{key}={value}" if is_short else override


def _model_source(override: str) -> str:
    """Let ``model=FOLDER`` and ``model=HUB_ID`` stand for ``model.source=...``; a bare name is a preset."""
    key, _, value = override.partition("=")
    is_place = "/" in value or "\\" in value or value.startswith((".", "~", "modelscope:"))
    if key != "model" or not is_place or value[0] in "'\"{[":
        return override
    return f"model.source={quoted(value)}"


def _optional_groups(schema: type) -> Iterator[tuple[str, type]]:
    """Yield settings that are null until their config group is chosen; its YAML takes NAME_schema as base."""
    hints = type_hints(schema)
    for field in dataclasses.fields(schema):
        inner = nested_settings(hints[field.name])
        if inner is not None and field.default is None:
            yield field.name, inner


def _with_deepspeed(overrides: list[str]) -> list[str]:
    """Let ``deepspeed.NAME=...`` alone stand for the group ``zero2`` with that setting."""
    keys = [override.partition("=")[0] for override in overrides]
    is_alone = any(key.startswith("deepspeed.") for key in keys) and "deepspeed" not in keys
    return ["deepspeed=zero2", *overrides] if is_alone else overrides


def _several_benchmarks(override: str, command: Command) -> str:
    """Let ``benchmark=ceval,mmlu`` stand for ``benchmarks=[ceval,mmlu]`` where a command takes several."""
    key, _, value = override.partition("=")
    takes_several = any(path == "benchmarks" for path, _, _ in setting_rows(command.schema))
    return f"benchmarks=[{value}]" if key == "benchmark" and "," in value and takes_several else override


def load_settings(command: Command, overrides: Sequence[str], extra_configs: Path | None = None) -> Any:
    """Compose and check: the settings object of a command line.

    Raises:
        ConfigError: see ``compose`` and ``glmtune.settings.build_settings``.
    """
    return build_settings(command.schema, compose(command, overrides, extra_configs))


def _check_group_options(overrides: Sequence[str], extra: Path | None) -> None:
    groups = config_groups()
    for override in overrides:
        match = re.fullmatch(r"\+{0,2}([a-z_]+)(?:@[\w.]+)?=([\w.-]+)", override)
        if (
            match
            and match[1] in groups
            and match[2] not in ("null", *(options := group_options(match[1], extra)))
        ):
            raise ConfigError(unknown_name(f"`{match[1]}`", match[2], options))


def _explain(message: str, command: Command) -> str:
    """Reword Hydra's messages: say which key is meant, and the nearest one that exists."""
    unknown = re.search(r"Could not override '([^']+)'", message) or re.search(
        r"Key '([^']+)' is not in struct", message
    )
    first_line = message.strip().splitlines()[0]
    if unknown is None:
        return f"{first_line} Overrides look like `trainer.max_steps=100` or `data=ads`."
    key = unknown[1]
    known = [path for path, _, _ in setting_rows(command.schema)]
    if key in config_groups():
        return f"`{key}` is a group added to `{command.name}`: write `+{key}=NAME`."
    # What people type who know other trainers: `lr`, then the right name under no section or a wrong one,
    # then a slip of the finger.
    initials = [path for path in known if key == path.rpartition(".")[0] + "." + _initials(path)]
    inside = [path for path in known if path.endswith(f".{key}")]
    near = initials or inside or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    guess = f" Did you mean `{near[0]}`?" if near else ""
    return f"`{key}` is no setting of `glmtune {command.name}`.{guess} See `glmtune {command.name} --help`."


def _initials(path: str) -> str:
    """Return the first letters of a setting's words: `trainer.learning_rate` -> `lr`."""
    return "".join(word[0] for word in path.rpartition(".")[2].split("_"))
