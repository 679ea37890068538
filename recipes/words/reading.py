"""Read the words of a command line: settings, with or without dashes, names of other tools, files."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmtune.errors import ConfigError, UnknownSettingError
from recipes.words.aliases import ALIASES, EPOCHS, UNSUPPORTED, VALUES, Alias, settings_meant
from recipes.words.command import Command, config_dir, default_values, group_options
from recipes.words.values import literal as literal_of
from recipes.words.values import quoted

SETTINGS_FILES = (".yaml", ".yml")
ROW_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zip")
# Of the model in most commands, and documented by these names: they stay, in what `plan` recommends, too.
SHORT_NAMES = ("quantization", "quantization_bit", "quantization_activations", "quantization_embeddings")
BOOLEANS = {"true": "true", "yes": "true", "on": "true", "1": "true"} | {
    "false": "false", "no": "false", "off": "false", "0": "false",
}  # fmt: skip
MULTIRUN = ("-m", "--multirun")  # Hydra's own
NO_VALUE = ("false", "none", "null", "")


@dataclass
class Reading:
    """What the words of a command line say.

    Attributes:
        overrides: settings under our names, their values as they were typed.
        renamed: words that are none of ours, and the overrides that they became.
        needless: words that ask for what is so anyhow, and why it is.
        config_dir: folder of `--config-dir`.
    """

    overrides: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    needless: list[tuple[str, str]] = field(default_factory=list)
    config_dir: Path | None = None

    @property
    def notes(self) -> list[str]:
        """Return what whoever typed the words should know of them, a line for each kind."""
        lines = []
        if self.renamed:
            typed, became = (" ".join(filter(None, side)) for side in zip(*self.renamed, strict=True))
            lines.append(f"`{typed}` is read as `{became}`.")
        if self.needless:
            reasons = "; ".join(f"`{typed}` ({why})" for typed, why in self.needless)
            lines.append(f"No setting is needed for {reasons}.")
        return lines


def read_words(words: Sequence[str], command: Command, config_dir: Path | None = None) -> Reading:
    """Turn words into overrides.

    Args:
        words: what follows the command's name; overrides of ours stay what they are.
        command: which command.
        config_dir: a user's own config tree, unless the words name one.

    Raises:
        ConfigError: a word that cannot be obeyed, with what to write.
    """
    reader = _Reader(command, deque(words), Reading(config_dir=config_dir))
    reader.read()
    return reader.reading


def unknown_setting(key: str, command: Command) -> UnknownSettingError:
    """Make the error for a setting that does not exist: it names the nearest one by meaning, or by letters.

    Args:
        key: as it was given.
        command: which command.
    """
    known = list(command.types)
    section, _, leaf = key.rpartition(".")
    # What people type who know other trainers: its name there, `lr`, then the right name under no section or
    # a wrong one, then a slip of the finger. That is looked for in the name alone: what a long section has in
    # common with itself makes anything look alike.
    meant = settings_meant(leaf, [*known, *command.groups])
    initials = [path for path in known if f"{section}." == path[: -len(path.rpartition(".")[2])]
                and leaf == _initials(path)]  # fmt: skip
    inside = [path for path in known if path.rpartition(".")[2] == leaf]
    names = {path.rpartition(".")[2]: path for path in known}
    names |= {path.rpartition(".")[2]: path for path in known if path.rpartition(".")[0] == section}
    close = [names[name] for name in difflib.get_close_matches(leaf, names, n=1, cutoff=0.75)]
    own = {path.rpartition(".")[2]: path for path in known if section and path.rpartition(".")[0] == section}
    beside = [own[name] for name in difflib.get_close_matches(leaf, own, n=1, cutoff=0.75)]
    near = beside or meant or initials or inside or close
    return UnknownSettingError(key, command.name, near[0] if near else None)


def _initials(path: str) -> str:
    """Return the first letters of a setting's words: `trainer.learning_rate` -> `lr`."""
    return "".join(word[0] for word in path.rpartition(".")[2].split("_"))


@dataclass
class _Reader:
    """The words still to be read, and what those before said."""

    command: Command
    pending: deque[str]
    reading: Reading
    num_bare: int = 0
    has_settings: bool = False
    counts_epochs: bool = False
    names_files: bool = False

    def read(self) -> None:
        while self.pending:
            word = self.pending.popleft()
            if word.partition("=")[0] == "--config-dir":
                self._config_dir(word)
            elif word in MULTIRUN:
                self._multirun(word)
            elif word.startswith("--"):
                self._flag(word)
            elif word.startswith("-"):
                raise ConfigError(
                    f"`{word}` is no option here. Options: --help, --cfg, --config-dir DIR, --debug. A"
                    " setting is given as `setting=value`."
                )
            elif "=" in word or word.startswith("~"):
                name, _, value = word.partition("=")
                self._setting(word, name, value) if "=" in word else self.reading.overrides.append(word)
                self.has_settings = True
            else:
                self._bare(word)
        self._complete()

    def _config_dir(self, word: str) -> None:
        value = word.partition("=")[2] or (self.pending.popleft() if self.pending else "")
        if not value or not Path(value).is_dir():
            raise ConfigError(f"`--config-dir` is `{value}`, but it must be an existing folder.")
        self.reading.config_dir = Path(value)

    def _multirun(self, word: str) -> None:
        if not self.command.takes_several:
            raise ConfigError(
                f"`{word}` is of `glmtune sweep`, which trains with several values of a setting:"
                " `glmtune sweep trainer.learning_rate=1e-3,2e-2`."
            )
        self.reading.needless.append((word, "a sweep is several runs"))

    # Words with dashes, as argparse and HfArgumentParser take them.

    def _flag(self, word: str) -> None:
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not self._is_known(name):
            raise unknown_setting(name, self.command).within(
                f"`{word.partition('=')[0]}` is no option here. ",
                " Options: --help, --cfg, --config-dir DIR, --debug.",
            )
        typed, num_left = word, len(self.pending)
        if not equals:
            value = self._value_of(name)
            typed = f"{word} {value}" if len(self.pending) < num_left else word
        self.has_settings = True
        self._setting(typed, name, value)

    def _is_known(self, name: str) -> bool:
        command = self.command
        places = (command.types, command.sections, command.groups, ALIASES, UNSUPPORTED)
        is_short = name in SHORT_NAMES and f"model.{name}" in command.types
        return is_short or any(name in place for place in places) or bool(self._leaves(name))

    def _value_of(self, name: str) -> str:
        """Take the words that belong to `--name`; none where it is a switch."""
        alias, path = ALIASES.get(name), name
        if name not in self.command.types:
            found = self._target(alias) if alias else next(iter(self._leaves(name)), None)
            path = found or name
        kind = str(self.command.types.get(path, ""))
        following = self.pending[0] if self.pending else None
        has_value = following is not None and not following.startswith("--")
        if "bool" in kind or (path not in self.command.types and self._is_switch(name, alias)):
            known = following is not None and (
                following.lower() in BOOLEANS
                or (alias is not None and following.lower() in alias.values)
                or (alias is not None and following.isdecimal())
            )
            return self.pending.popleft() if known else "true"
        if not has_value:
            if alias is not None and "true" in alias.values:
                return "true"
            raise ConfigError(f"`--{name}` is given no value: write `{name}=VALUE`.")
        if "list" in kind:
            items = []
            while self.pending and not self.pending[0].startswith("-") and "=" not in self.pending[0]:
                items.append(self.pending.popleft())
            return items[0] if len(items) == 1 else f"[{','.join(items)}]"
        return self.pending.popleft()

    def _is_switch(self, name: str, alias: Alias | None) -> bool:
        if alias is None:
            return UNSUPPORTED.get(name) in ("true", "false")
        is_choice = not alias.values.keys() <= {"true", "false"}
        return not alias.to and not is_choice and bool(alias.values or alias.needless)

    # Names.

    def _setting(self, typed: str, name: str, value: str, literal: str | None = None) -> None:
        """Read one setting.

        Args:
            typed: for messages.
            name: ours, or one of other tools.
            value: as typed.
            literal: in Hydra's grammar, where the value comes from a file and has its type.
        """
        overrides, why = self._meaning(typed, name, value, value if literal is None else literal)
        self.reading.overrides += overrides
        is_ours = name.lstrip("+") in (*SHORT_NAMES, *self.command.groups)
        if why:
            self.reading.needless.append((typed, why))
        elif not is_ours and overrides != [f"{name}={value if literal is None else literal}"]:
            self.reading.renamed.append((typed, " ".join(overrides)))

    def _meaning(self, typed: str, name: str, value: str, literal: str) -> tuple[list[str], str]:
        """Return overrides, and why there are none."""
        command, plus = self.command, name[: len(name) - len(name.lstrip("+"))]
        bare = name[len(plus) :]
        if bare in command.groups and value[:1] not in ("'", '"', "{", "["):
            return self._option(bare, value), ""
        if bare in SHORT_NAMES and f"model.{bare}" in command.types:
            return [f"{bare}={literal}"], ""
        if bare in command.types:
            return [f"{name}={VALUES.get(bare, {}).get(value.lower(), literal)}"], ""
        if "." in bare or bare in command.sections or bare.startswith("~"):
            return [f"{name}={literal}"], ""
        name = bare
        if name in ALIASES:
            return self._alias(typed, name, value, literal)
        leaves = self._leaves(name)
        if len(leaves) > 1:
            ways = "`, `".join(f"{path}={value}" for path in leaves)
            raise ConfigError(f"`{typed}` may mean several settings. Write one of `{ways}`.")
        if leaves:
            return self._renamed(name, leaves[0], value, literal)
        if name in UNSUPPORTED:
            if value.lower() in (UNSUPPORTED[name], *(NO_VALUE if UNSUPPORTED[name] in NO_VALUE else ())):
                return [], "that is so anyhow"
            raise ConfigError(
                f"`{typed}` cannot be obeyed: `{name}` is an argument of transformers' trainer that glmtune"
                f" does not have. Leave it out; `glmtune {command.name} --help` lists the settings."
            )
        return [f"{plus}{name}={literal}"], ""

    def _leaves(self, name: str) -> list[str]:
        """Return the settings whose last part is a name of several words; a single word says too little."""
        if "_" not in name:
            return []
        return [path for path in self.command.types if path.rpartition(".")[2] == name]

    def _target(self, alias: Alias) -> str | None:
        there = (*self.command.types, *self.command.groups)
        return next((path for path in alias.to if path in there), None)

    def _alias(self, typed: str, name: str, value: str, literal: str) -> tuple[list[str], str]:
        alias, target = ALIASES[name], self._target(ALIASES[name])
        plain = value.lower()
        if alias.values or alias.own:
            plain = plain if plain in alias.values else BOOLEANS.get(plain, plain)
            plain = "false" if plain in NO_VALUE and "false" in alias.values else plain
        if plain in alias.values and not (target and name == "overwrite_output_dir"):
            words = alias.values[plain].split()
            unknown = [word for word in words if not self._takes(word)]
            if unknown:
                raise unknown_setting(name, self.command)
            return words, "" if words else "that is so anyhow"
        if target is not None:
            return self._renamed(name, target, value, literal)
        is_off = plain in NO_VALUE
        if alias.needless and (not alias.own or (self.command.name in alias.own) != is_off):
            return [], alias.needless if not is_off or not alias.own else "that is so anyhow"
        if alias.refused and not (alias.own and is_off):
            raise ConfigError(f"`{typed}` cannot be obeyed: {alias.refused}.")
        if alias.own:
            raise ConfigError(f"`{typed}` cannot be obeyed: {alias.needless}. Leave it out.")
        raise unknown_setting(name, self.command)

    def _takes(self, word: str) -> bool:
        return word.partition("=")[0] in (*self.command.types, *self.command.groups)

    def _renamed(self, name: str, path: str, value: str, literal: str) -> tuple[list[str], str]:
        if path in self.command.groups:
            return self._option(path, value), ""
        self.counts_epochs |= path == EPOCHS and value.lower() not in NO_VALUE
        self.names_files |= path in ("data.train_file", "data.validation_file", "data.test_file")
        return [f"{path}={VALUES.get(path, {}).get(value.lower(), literal)}"], ""

    # Options of groups.

    def _option(self, group: str, value: str) -> list[str]:
        """Choose an option of a group, or what the group is about by its place on this machine."""
        if group == "recipe" and value.lower() in NO_VALUE:
            return []
        if value == "null" and default_values(self.command.schema)[group] is not None:
            raise ConfigError(
                f"`{group}` is null, but `glmtune {self.command.name}` needs one. Leave it out."
            )
        prefix = "+" if group == "recipe" else ""
        options = group_options(group, self.reading.config_dir)
        if value in (*options, "null", ""):
            return [f"{prefix}{group}={value}"]
        if group == "model" and _is_place(value):
            return [f"model.source={_exact(value)}"]
        if group == "data" and _is_rows(value):
            return ["data=files", f"data.{self._split()}_file={_exact(value)}"]
        if group == "deepspeed" and value.endswith(".json"):
            return [f"deepspeed.config_file={_exact(value)}"]
        if group == "benchmark" and value.lower().endswith((".yaml", ".yml")):
            return [f"benchmark.name={_exact(value)}"]
        if group == "benchmark" and "," in value and "benchmarks" in self.command.types:
            return [f"benchmarks=[{value}]"]
        same = [option for option in options if option.lower() == value.lower()]
        if group == "model" and not same and Path(value).is_dir():
            return [f"model.source={_exact(value)}"]
        return [f"{prefix}{group}={same[0] if same else value}"]

    def _split(self) -> str:
        """Return which rows a file named as the data set holds: those that the command works on."""
        if self.command.name != "predict":
            return "train"
        words = [*self.reading.overrides, *self.pending]
        named = [word.partition("=")[2] for word in words if word.startswith("split=")]
        return named[-1] if named else "test"

    # Words alone.

    def _bare(self, word: str) -> None:
        bare_words = self.command.bare_words
        if word.lower().endswith(SETTINGS_FILES):
            self._settings_file(Path(word))
            return
        if self.num_bare < len(bare_words) and not self.has_settings:
            self.reading.overrides.append(f"{bare_words[self.num_bare]}={_exact(word)}")
            self.num_bare += 1
            return
        groups = [
            group
            for group in self.command.groups
            if word.lower() in [name.lower() for name in group_options(group, self.reading.config_dir)]
        ]
        if len(groups) == 1:
            self.has_settings = True
            self.reading.overrides += self._option(groups[0], word)
            self.reading.renamed.append((word, self.reading.overrides[-1]))
            return
        way = "`setting=value`, such as `trainer.max_steps=100`"
        if groups:
            way = " or ".join(f"`{group}={word}`" for group in groups)
        elif "data" in self.command.groups and Path(word).is_file():
            way = f"`data={word}` for a file of rows"
        elif "model" in self.command.groups and Path(word).is_dir():
            way = f"`model={word}` for the folder of a model"
        raise ConfigError(f"`{word}` is no override: write {way}.")

    def _settings_file(self, path: Path) -> None:
        """Read settings from a file: nested as in a run's config.yaml, or flat, under any name known here."""
        import yaml

        from glmtune.storage.yaml_text import read_yaml

        try:
            values = read_yaml(path.expanduser())
            if not isinstance(values, dict):
                raise yaml.YAMLError("it does not hold names with values")
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(
                f"`{path}` stands for settings, but it cannot be read: {error}. Name a YAML file of settings."
            ) from error
        self.has_settings = True
        for name, value in _flat(values, self.command.types):
            if name.partition(".")[0] in ("defaults", "hydra"):
                raise ConfigError(
                    f"{path}: `{name}` is of Hydra's own files, which `--config-dir` searches. Here a group"
                    " is chosen by its name, such as `recipe: ptuning` or `data: files`."
                )
            text, literal = _plain(value), literal_of(value)
            # Groups that are null by default take a part of their settings only by force.
            first = name.partition(".")[0]
            forced = "++" if "." in name and first not in ("deepspeed", "retain") else ""
            self._setting(f"{name}={text}", f"{forced}{name}", text, literal)

    # What only all words together tell.

    def _complete(self) -> None:
        overrides = self.reading.overrides
        keys = [override.partition("=")[0].lstrip("+") for override in overrides]
        if self.counts_epochs and "trainer.max_steps" not in keys:
            overrides.append("trainer.max_steps=null")
            self.reading.renamed.append(("", "trainer.max_steps=null"))
        if self.names_files and "data" in self.command.groups and not self._chooses_data(keys):
            overrides.insert(0, "data=files")
            self.reading.renamed.append(("", "data=files"))
        self.reading.overrides = list(self._last_of_each(overrides))

    def _chooses_data(self, keys: list[str]) -> bool:
        if "data" in keys:
            return True
        roots = [config_dir(), *([self.reading.config_dir] if self.reading.config_dir else [])]
        recipes = [word.partition("=")[2] for word in self.reading.overrides if word.startswith("+recipe=")]
        files = [root / "recipe" / f"{recipe}.yaml" for root in roots for recipe in recipes]
        return any("override /data:" in file.read_text("utf-8") for file in files if file.is_file())

    def _last_of_each(self, overrides: list[str]) -> Iterator[str]:
        """Leave of several choices in one group the last: Hydra refuses two, and what follows a file wins.

        Null takes back what was chosen before; by itself it is what a group of that kind is anyhow.
        """
        chosen: dict[str, int] = {}
        for place, override in enumerate(overrides):
            group = override.partition("=")[0].lstrip("+")
            if group in self.command.groups:
                chosen[group] = place
        for place, override in enumerate(overrides):
            key = override.partition("=")[0].lstrip("+")
            group = key.partition(".")[0]
            taken_back = chosen.get(group, -1) > place and overrides[chosen[group]] == f"{group}=null"
            replaced = taken_back or (key == "model.source" and chosen.get("model", -1) > place)
            is_null = key in self.command.groups and override == f"{key}=null"
            if not (replaced or is_null) and chosen.get(key, place) == place:
                yield override


def _is_place(value: str) -> bool:
    """Whether a model is named by its place: a path, an id of a hub, or a folder that is here."""
    is_written_so = "/" in value or "\\" in value or value.startswith((".", "~", "modelscope:"))
    return is_written_so or (Path(value) / "config.json").is_file()


def _is_rows(value: str) -> bool:
    """Whether a data set is named by a file, an id of a hub, or rows that come with glmtune."""
    is_written_so = "/" in value or "\\" in value or value.startswith(("~", "shipped:", "generated:"))
    return is_written_so or value.lower().endswith(ROW_FILES) or Path(value).is_file()


def _exact(value: str) -> str:
    """Write what was typed for a setting of text, quoted only where it could be read as anything else."""
    is_plain = value[:1] not in ("'", '"', "[", "{", "$") and "\\" not in value and value != "null"
    return value if is_plain else quoted(value)


def _flat(values: dict[Any, Any], settings: Collection[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield names and values; a setting that is a dictionary itself stays whole."""
    for name, value in values.items():
        if isinstance(value, dict) and value and f"{path}{name}" not in settings:
            yield from _flat(value, settings, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _plain(value: Any) -> str:
    """Write a value of YAML as it would be typed."""
    return value if isinstance(value, str) else literal_of(value)
