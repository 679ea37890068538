"""Every YAML of the config tree composes and becomes settings."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from glmtune.cli import COMMANDS
from glmtune.errors import ConfigError
from glmtune.models.releases.presets import PRESETS
from recipes.words.compose import Command, config_dir, config_groups, default_values, load_settings
from tests.conftest import slow_except

GROUPS = config_groups()
PAIRS = [(group, option) for group, options in GROUPS.items() for option in options]


def command(name: str) -> Command:
    return importlib.import_module(COMMANDS[name][0]).COMMAND


def users_of(group: str) -> list[str]:
    """Commands that a group belongs to: those whose schema has the key; recipes belong to train."""
    if group == "recipe":
        return ["train"]
    return [name for name in COMMANDS if group in default_values(command(name).schema)]


def required(name: str) -> list[str]:
    """Values for settings that have no default, so that the rest can be composed."""
    return [
        f"{key}=somewhere" for key, value in default_values(command(name).schema).items() if value == "???"
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_command_composes_without_overrides(name: str) -> None:
    settings = load_settings(command(name), required(name))
    assert isinstance(settings, command(name).schema)


def belonging(name: str, group: str, option: str) -> list[str]:
    """Options without which another one has no meaning, where a command has both."""
    other = {"preference": "data=preference"}.get(group, "")
    if (group, option) == ("data", "preference"):
        other = "preference=dpo"
    if not other or group_of(other) not in default_values(command(name).schema):
        return []
    return [other, "prefix.switch=false"] if name == "quickstart" else [other]  # its recipe has a switch


def group_of(override: str) -> str:
    return override.partition("=")[0]


TRIPLES = [(group, option, name) for group, option in PAIRS for name in users_of(group)]


def covering() -> list[tuple[str, str, str]]:
    """Each option with the first of its commands and a later one in turn, so that each command has each group."""
    chosen = []
    for group, options in GROUPS.items():
        names = users_of(group)
        assert names, f"configs/{group}/ belongs to no command"
        for place in range(max(len(options), len(names))):
            option = options[place % len(options)]
            chosen += [(group, option, names[0]), (group, option, names[place % len(names)])]
    return chosen


@pytest.mark.parametrize(("group", "option", "name"), slow_except(set(covering()), TRIPLES))
def test_group_option_composes(group: str, option: str, name: str) -> None:
    prefix = "+" if group == "recipe" else ""
    words = [*required(name), f"{prefix}{group}={option}", *belonging(name, group, option)]
    settings = load_settings(command(name), words)
    assert isinstance(settings, command(name).schema)


def test_every_preset_is_a_model_option() -> None:
    assert set(GROUPS["model"]) == set(PRESETS)
    for name in PRESETS:
        settings = load_settings(command("info"), [f"model={name}"])
        assert settings.model.source == name


def test_every_yaml_is_reached() -> None:
    known = {Path(group) / f"{option}.yaml" for group, option in PAIRS} | {
        Path(f"{name}.yaml") for name in COMMANDS
    }
    found = {path.relative_to(config_dir()) for path in config_dir().rglob("*.yaml")}
    assert {path for path in found if path.parts[0] != "local"} == known


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+recipe=ptunning", ["`recipe` is `ptunning`", "Did you mean `ptuning`"]),
        ("trainer.learning_rat=1", ["`trainer.learning_rat`", "Did you mean `trainer.learning_rate`"]),
        ("trainer.lr=1", ["`trainer.lr`", "Did you mean `trainer.learning_rate`"]),
        ("+trainer.learning_rat=1", ["`trainer.learning_rat` is no setting", "trainer.learning_rate"]),
        ("trainer.learning_rate=fast", ["`trainer.learning_rate` is 'fast'", "valid number"]),
        ("data=adgenn", ["`data` is `adgenn`", "Did you mean `adgen`"]),
        ("trainer.max_steps=[1", ["Overrides look like"]),
    ],
)
def test_wrong_overrides_are_refused(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(command("train"), [override])
    assert all(word in str(caught.value) for word in words), str(caught.value)
