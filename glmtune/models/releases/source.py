"""From what a user names (preset, hub id, folder) to a folder on this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from glmtune.errors import CheckpointError, ConfigError, unknown_name
from glmtune.models.releases.families import Family, family_of_name
from glmtune.models.releases.hub import (
    MODELSCOPE,
    MODELSCOPE_OWNER,
    OWNERS,
    download,
    download_from_modelscope,
)
from glmtune.models.releases.presets import PRESETS
from glmtune.storage.files import put_back

ASSETS = Path(__file__).resolve().parents[2] / "assets"


def resolve_source(source: str | Path, download_options: Mapping[str, object] | None = None) -> Path:
    """Find or download a model.

    Args:
        source: a preset name, `THUDM/<name>` or `zai-org/<name>`, or a folder of any name. A folder on this
            machine called like the hub id is taken before the hub. `modelscope:` in front of a preset or id
            takes it from ModelScope.
        download_options: see `glmtune.models.releases.hub.download`; for a source that `is_downloaded`.

    Returns:
        The folder with config.json, weights and tokenizer files. Downloads leave out code and take one weight
        format only.

    Raises:
        ConfigError: no such name, nearest names first.
        CheckpointError: a download failed.
        MissingExtraError: `modelscope:` without ModelScope's package.
    """
    name = str(source)
    if name.startswith(MODELSCOPE):
        return download_from_modelscope(_modelscope_name(name))
    # Presets before folders (a run started beside a folder `glm-tiny` means the same model everywhere),
    # folders before hub ids (`git clone` makes THUDM/chatglm2-6b, and whoever has it wants no download).
    folder = Path(source).expanduser()
    preset = PRESETS.get(name) if isinstance(source, str) else None
    if preset is not None:
        if preset.hub_id is None:
            return _embedded(name)
        return download(preset.hub_id.split("/")[1], download_options)
    if preset is None:
        put_back(folder)
    if folder.is_dir():
        return folder
    if isinstance(source, str) and is_hub_id(name):
        return download(name.split("/")[1], download_options)
    if folder.is_file():
        raise ConfigError(
            f"`model.source` is the file `{name}`, but it must be a folder; pass `{folder.parent}`."
        )
    if "/" in name or "\\" in name or name.startswith((".", "~")):
        raise ConfigError(
            f"`model.source` is `{name}`, but there is no such folder (looked in {Path.cwd()}), and only hub "
            f"ids under {' and '.join(f'{owner}/' for owner in OWNERS)} are fetched. Correct the path; "
            "download any other hub model with `hf download` and give its folder."
        ).see("no-such-model")
    raise ConfigError(
        unknown_name("`model.source`", name, PRESETS)
        + f" A hub id under {' or '.join(f'{owner}/' for owner in OWNERS)} and a folder work too."
    )


def is_downloaded(source: str | Path) -> bool:
    """Whether a source is a model on the hub rather than a folder, the embedded model or ModelScope's."""
    if not isinstance(source, str):
        return False
    if source in PRESETS:
        return PRESETS[source].hub_id is not None
    return is_hub_id(source) and not Path(source).expanduser().is_dir()


def family_of_source(source: str | Path) -> Family | None:
    """Return the family that a preset or hub id tells by itself, None for a folder."""
    if isinstance(source, str) and source.startswith(MODELSCOPE):
        return family_of_name(source)
    if isinstance(source, str) and source in PRESETS:
        return None if PRESETS[source].hub_id is None else PRESETS[source].family
    if isinstance(source, str) and is_hub_id(source) and not Path(source).is_dir():
        return family_of_name(source.split("/")[1])
    return None


def is_hub_id(name: str) -> bool:
    """Whether a name is an id of the owners whose models are fetched; an id may still be no model."""
    return re.fullmatch(rf"({'|'.join(OWNERS)})/[\w.-]+", name) is not None


def _modelscope_name(name: str) -> str:
    asked = name.removeprefix(MODELSCOPE)
    owner, _, release = asked.rpartition("/")
    if owner not in ("", MODELSCOPE_OWNER, *OWNERS) or not re.fullmatch(r"[\w.-]+", release):
        raise ConfigError(
            f"`model.source` is `{name}`, but after `{MODELSCOPE}` must stand a release: `chatglm2-6b` "
            f"or `{MODELSCOPE_OWNER}/chatglm2-6b`. Correct it, or download the files and give their folder."
        )
    return release


def _embedded(name: str) -> Path:
    folder = ASSETS / name
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"The embedded model {name} is not in this installation ({folder} has no config.json). Install "
            "glmtune from its wheel, or rebuild the model with `glmtune train +recipe=pretrain_tiny`."
        )
    return folder
