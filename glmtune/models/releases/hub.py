"""Download an official release: weights in one format, configuration and tokenizer files, never code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glmtune.errors import CheckpointError, MissingExtraError
from glmtune.models.releases.presets import PRESETS

OWNERS = ("zai-org", "THUDM")
"""Two names of one organisation on the hub; the present one first. Caches hold releases under either."""
MODELSCOPE = "modelscope:"
"""In front of a name: take it from ModelScope instead of the hub."""
MODELSCOPE_OWNER = "ZhipuAI"
SMALL_FILES = ["*.json", "*.model", "*.txt"]
"""Configuration and tokenizer files; never code."""
SAFETENSORS, PICKLES = "model*.safetensors", "pytorch_model*.bin"


def download(name: str, options: Mapping[str, object] | None = None) -> Path:
    """Fetch a release through huggingface_hub: its cache, offline mode, mirrors and login are obeyed.

    Args:
        name: the release without its owner, such as ``chatglm2-6b``. It is looked for under every owner,
            where the local cache has it first, so that both ids are one model.
        options: of huggingface_hub's `snapshot_download`: ``revision``, ``cache_dir``, ``token``, ...

    Returns:
        The folder of the snapshot.

    Raises:
        CheckpointError: it is on none of them, needs a login, or neither network nor cache has it.
    """
    # Imported here: it takes time, and local folders need none of it.
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    given: dict[str, Any] = dict(options or {})
    place = {key: given[key] for key in ("cache_dir", "revision") if key in given}
    ids = [f"{owner}/{name}" for owner in OWNERS]
    # What the cache has first: offline, the other id would fail before this one is tried.
    ids.sort(key=lambda hub_id: not isinstance(try_to_load_from_cache(hub_id, "config.json", **place), str))
    shown = " and ".join(f"`{hub_id}`" for hub_id in ids)
    reason = ""
    for hub_id in ids:
        try:
            return _fetch(
                lambda patterns, hub_id=hub_id: snapshot_download(hub_id, allow_patterns=patterns, **given)
            )
        except GatedRepoError:
            raise CheckpointError(
                f"`{hub_id}` is gated: its owner lets in only accounts that asked. Accept the terms on its "
                "page and run `hf auth login`, or download the files elsewhere and pass their folder as "
                "`model.source`."
            ) from None
        except RepositoryNotFoundError:
            continue
        except RevisionNotFoundError:
            raise CheckpointError(
                f"`{hub_id}` has no revision `{given.get('revision')}`. Look it up on the model's page, or "
                "leave `revision` out."
            ) from None
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = reason or (str(error).strip() or type(error).__name__).splitlines()[0]
    if not reason:
        raise CheckpointError(
            f"{shown} are not on the hub, or need a login (`hf auth login`). Known models: "
            f"{', '.join(PRESETS)}."
        )
    raise CheckpointError(
        f"{shown} could not be downloaded and are not in the local cache ({reason}). Check the network "
        "(HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1 forbids the network), or download the files "
        "elsewhere and pass their folder as `model.source`. `glm-tiny` needs no download."
    ).see("download")


def download_from_modelscope(name: str) -> Path:
    """Fetch a release through ModelScope's own package, into its cache.

    Args:
        name: the release without its owner, such as ``chatglm2-6b``.

    Returns:
        The folder of the snapshot.

    Raises:
        MissingExtraError: the package is not installed.
        CheckpointError: the download failed.
    """
    try:
        from modelscope import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtraError(f"`{MODELSCOPE}{name}`", extra="modelscope") from None
    model_id = f"{MODELSCOPE_OWNER}/{name}"
    try:
        return _fetch(lambda patterns: snapshot_download(model_id, allow_patterns=patterns))
    except Exception as error:  # the package has no common class for its failures
        raise CheckpointError(
            f"`{model_id}` could not be fetched from ModelScope ({error}). Check the name and the network, "
            f"or drop `{MODELSCOPE}` to use the hub."
        ) from error


def _fetch(snapshot: Callable[[list[str]], str]) -> Path:
    """Take safetensors where a repository has them, pickles otherwise: several hold both."""
    folder = Path(snapshot([*SMALL_FILES, SAFETENSORS]))
    if any(folder.glob(SAFETENSORS)):
        return folder
    return Path(snapshot([*SMALL_FILES, PICKLES]))
