"""What shaped the prompts a run was trained on: recorded with what it tuned, and taken over by who asks it.

A prefix trained on 256 tokens and asked with 64 answers half a question. So the settings below travel with
the weights: in the manifest of their folder, in the metadata of a prefix's file; a run from before that has
its config.yaml.

    prefix file > checkpoint.json beside it > config.yaml in the folder, or above last/, best/, checkpoint-N/

Whoever answers takes them, except those that were given on the command line. These files come from anywhere:
they are data, checked like settings, and no reference in them is resolved.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from glmtune.data.lengths import LENGTHS
from glmtune.data.settings import PREFERENCE, DataSettings
from glmtune.errors import ConfigError
from glmtune.settings import as_given, build_settings
from glmtune.storage.json_files import parse_json
from glmtune.storage.manifest import read_manifest
from glmtune.storage.yaml_text import read_yaml

LOGGER = logging.getLogger(__name__)
KEY = "trained_with"
"""Of the record in manifests and results."""
CONFIG_FILE = "config.yaml"
PROMPT = ("max_source_length", "max_target_length", "source_prefix", "system")
"""What shapes a prompt, whatever file its question comes from."""
COLUMNS = ("layout", "prompt_column", "response_column", "history_column")
"""How a file is read: these belong together, as names of columns fit one layout only."""
IS_CHAT = "is_chat"
"""In the record: whether rows were conversations, which the model's template writes, or plain text."""
NOT_RECORDED = "not_recorded"
"""In the record: names of settings whose value came from the environment."""


def record(settings: DataSettings, system: str | None = None, *, is_chat: bool = True) -> dict[str, Any]:
    """Return what shapes a prompt, to be kept with what is trained.

    Args:
        settings: of the training rows, the lengths that the data told in place.
        system: the system message that all of these rows have, if there is such a one.
        is_chat: whether these rows have questions.

    Returns:
        Plain values. One from the environment may be a secret: only its name is kept.
    """
    values = {name: getattr(settings, name) for name in (*PROMPT, *COLUMNS)}
    if settings.layout == PREFERENCE:  # pairs to learn from; who asks has questions
        values |= {"layout": "auto", **dict.fromkeys(COLUMNS[1:])}
    if values["system"] is None:
        values["system"] = system
    hidden = [name for name, value in values.items() if as_given(f"data.{name}", value) is not value]
    kept = {name: value for name, value in values.items() if name not in hidden} | {IS_CHAT: is_chat}
    return {**kept, NOT_RECORDED: hidden} if hidden else kept


def trained_with(place: Path, text: str = "") -> dict[str, Any] | None:
    """Find what shaped the prompts of something tuned.

    Args:
        place: folder of the tuned weights, or a run folder.
        text: the record as a prefix's file holds it; "" where it holds none.

    Returns:
        Values by name of the data setting, those that are known; None where nothing is.
    """
    for origin, read in (
        (place, lambda: parse_json(text.encode()) if text else None),
        (place, lambda: (read_manifest(place) or {}).get(KEY)),
        (place / "last", lambda: (read_manifest(place / "last") or {}).get(KEY)),
        (run_of(place) / CONFIG_FILE, lambda: _of_config(run_of(place))),
    ):
        try:
            found = read()
            if found is not None:
                return _checked(found)
        except (OSError, ValueError, yaml.YAMLError, RecursionError, ConfigError) as error:
            LOGGER.warning(
                "%s cannot be read for the data settings of the training (%s): those given here count.",
                origin, error,
            )  # fmt: skip
            return None
    return None


def trained_with_prefix(file: Path) -> dict[str, Any] | None:
    """Find what shaped the prompts of a prefix, as `trained_with` does.

    Args:
        file: of the prefix.

    Raises:
        CheckpointError: it is damaged.
    """
    from glmtune.prefix.checkpoint import describe_prefix  # PyTorch

    return trained_with(file.parent, describe_prefix(file).meta.trained_with)


def run_of(place: Path) -> Path:
    """Return the run folder that ``last``, ``best`` or a checkpoint lies in; other folders are their own."""
    is_part = place.name in ("last", "best") or place.name.startswith("checkpoint-")
    return place.parent if is_part else place


def _of_config(run: Path) -> Mapping[str, Any] | None:
    """Read the data settings of a run from before they were recorded; lengths of null tell nothing."""
    try:
        settings = read_yaml(run / CONFIG_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    # Other tools have files of this name, too.
    data = settings.get("data") if isinstance(settings, Mapping) and "tune" in settings else None
    if not isinstance(data, Mapping):
        return None
    known = {name: data[name] for name in (*PROMPT, *COLUMNS) if name in data}
    known = {name: value for name, value in known.items() if value is not None or name not in LENGTHS}
    hidden = [name for name, value in known.items() if "${" in str(value)]
    return {name: value for name, value in known.items() if name not in hidden} | {NOT_RECORDED: hidden}


def data_of_run(tuned: Path) -> dict[str, Any] | None:
    """Return all data settings of the run that left something tuned: also which files its rows are in.

    Args:
        tuned: file of a prefix or folder of an adapter, in the run's folder.

    Returns:
        Values by name; None where no run's config.yaml is beside it.

    Raises:
        ConfigError: it cannot be read; a value came from the environment and must be given again.
    """
    file = run_of(tuned if tuned.is_dir() else tuned.parent) / CONFIG_FILE
    try:
        settings = read_yaml(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read ({error}). Name the rows: `data=...`.") from None
    if not isinstance(settings, Mapping) or "tune" not in settings:
        return None  # of another tool
    data = settings.get("data")
    if not isinstance(data, Mapping) or not all(isinstance(name, str) for name in data):
        raise ConfigError(f"{file} holds no data settings of a run. Name the rows: `data=...`.")
    if hidden := [name for name, value in data.items() if "${" in str(value)]:
        raise ConfigError(
            f"`data.{hidden[0]}` of {file} came from the environment, so it is not kept there. Name the rows:"
            " `data=...`."
        )
    return dict(data)


def _checked(found: object) -> dict[str, Any]:
    """Refuse what are no data settings.

    Raises:
        ConfigError: they are none.
    """
    if not isinstance(found, Mapping):
        raise ConfigError("it must hold names with values")
    values = {name: found[name] for name in (*PROMPT, *COLUMNS) if name in found}
    build_settings(DataSettings, values)
    hidden = found.get(NOT_RECORDED, [])
    if not isinstance(hidden, list) or not all(name in (*PROMPT, *COLUMNS) for name in hidden):
        raise ConfigError(f"`{NOT_RECORDED}` must list names of data settings")
    if IS_CHAT in found:
        if not isinstance(found[IS_CHAT], bool):
            raise ConfigError(f"`{IS_CHAT}` must be true or false")
        values[IS_CHAT] = found[IS_CHAT]
    return {**values, NOT_RECORDED: hidden}


def as_trained(
    settings: DataSettings, trained: Mapping[str, Any], given: Collection[str]
) -> tuple[DataSettings, str]:
    """Take over what a run was trained with, as far as nobody said otherwise.

    Args:
        settings: as composed.
        trained: from `trained_with`.
        given: names of the data settings that were given one by one.

    Returns:
        The settings to use; and in words which values were taken, and which of those given are others; "" if
        none is.

    Raises:
        ConfigError: a value that was given and one that was taken exclude each other.
    """
    names = [name for name in PROMPT if name in trained and name not in given]
    # Columns of the run are those of its files: a data set that names its layout has others.
    is_open = settings.layout == "auto" and not any(getattr(settings, name) for name in COLUMNS[1:])
    if is_open and not set(COLUMNS) & set(given):
        names += [name for name in COLUMNS if name in trained]
    taken = {name: trained[name] for name in names}
    shown = {name: value for name, value in taken.items() if value not in (None, "", "auto")}
    words = ", ".join(f"data.{name}={_shown(value)}" for name, value in shown.items())
    others = [
        f"data.{name}={_shown(getattr(settings, name))} is given (the run had {_shown(trained[name])})"
        for name in (*PROMPT, *COLUMNS)
        if name in given and name in trained and getattr(settings, name) != trained[name]
    ]
    words = "; ".join(filter(None, [words, *others]))
    if hidden := [f"data.{name}" for name in trained.get(NOT_RECORDED, ()) if name not in given]:
        words += f"; {', '.join(hidden)} came from the environment and must be given again"
    return replace(settings, **taken), words


def _shown(value: object) -> str:
    text = value if isinstance(value, str) and value.isidentifier() else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
