"""From what a user names (preset, hub id, folder) to a folder on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from glmtune.errors import CheckpointError, ConfigError, unknown_name
from glmtune.models.families import Family, family_of_name
from glmtune.models.presets import PRESETS

ASSETS = Path(__file__).resolve().parent.parent / "assets"
HUB_OWNERS = ("THUDM", "zai-org")
SMALL_FILES = ["*.json", "*.model", "*.txt"]
"""Configuration and tokenizer files; never code."""


def resolve_source(source: str | Path) -> Path:
    """Find or download a model.

    Args:
        source: a preset name, `THUDM/<name>` or `zai-org/<name>`, or a folder of any name. A folder on this
            machine called like the hub id is taken before the hub.

    Returns:
        The folder with config.json, weights and tokenizer files. Downloads leave out code and take one weight
        format only.

    Raises:
        ConfigError: no such name, nearest names first.
        CheckpointError: a download failed.
    """
    name = str(source)
    folder = Path(source).expanduser()
    preset = PRESETS.get(name) if isinstance(source, str) else None
    if preset is not None:
        return _download(preset.hub_id) if preset.hub_id else _embedded(name)
    if folder.is_dir():
        return folder
    if isinstance(source, str) and _is_hub_id(name):
        return _download(name)
    if folder.is_file():
        raise ConfigError(
            f"`model.source` is the file `{name}`, but it must be a folder; pass `{folder.parent}`."
        )
    if os.sep in name or name.startswith((".", "~")):
        raise ConfigError(
            f"`model.source` is `{name}`, but there is no such folder (looked in {Path.cwd()}), and only hub "
            f"ids under {' and '.join(f'{owner}/' for owner in HUB_OWNERS)} are fetched. Correct the path; "
            "download any other hub model with `hf download` and give its folder."
        )
    raise ConfigError(
        unknown_name("`model.source`", name, PRESETS)
        + f" A hub id under {' or '.join(f'{owner}/' for owner in HUB_OWNERS)} and a folder work too."
    )


def family_of_source(source: str | Path) -> Family | None:
    """Return the family that a preset or hub id tells by itself, None for a folder."""
    if isinstance(source, str) and source in PRESETS:
        return None if PRESETS[source].hub_id is None else PRESETS[source].family
    if isinstance(source, str) and _is_hub_id(source) and not Path(source).is_dir():
        return family_of_name(source.split("/")[1])
    return None


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(rf"({'|'.join(HUB_OWNERS)})/[\w.-]+", name) is not None


def _embedded(name: str) -> Path:
    folder = ASSETS / name
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"The embedded model {name} is not in this installation ({folder} has no config.json). Install "
            "glmtune from its wheel, or rebuild the model with `glmtune train +recipe=pretrain_tiny`."
        )
    return folder


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=SMALL_FILES))
        return Path(snapshot_download(hub_id, allow_patterns=[*SMALL_FILES, *_weight_patterns(folder)]))
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"`{hub_id}` is not on the hub, or needs a login. Known models: {', '.join(PRESETS)}."
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"`{hub_id}` could not be downloaded and is not in the local cache ({reason}). Check the network "
            "(HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1 forbids the network), or download the files "
            "elsewhere and pass their folder as `model.source`. `glm-tiny` needs no download."
        ) from None


def _weight_patterns(folder: Path) -> list[str]:
    """Choose one weight format, because several repositories hold both."""
    if (folder / "model.safetensors.index.json").is_file():
        return ["model*.safetensors"]
    if (folder / "pytorch_model.bin.index.json").is_file():
        return ["pytorch_model*.bin"]
    return ["model*.safetensors", "pytorch_model*.bin"]
