"""Low-rank adapters as PEFT saves them: find one, check that it belongs to a base, put it into the model."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from glmtune.errors import CheckpointError
from glmtune.models.releases.families import Family
from glmtune.models.releases.source import family_of_source

if TYPE_CHECKING:
    from peft import PeftModel

LOGGER = logging.getLogger(__name__)
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MANIFEST = "checkpoint.json"
"""What a run keeps beside its weights; it names the base."""
PLAIN_LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "fan_in_fan_out": False,
}
"""Keys of adapter_config.json and the values under which an adapter only adds a product of two matrices."""


def find_adapter(path: str | Path) -> Path:
    """Find the folder of a saved adapter.

    Args:
        path: that folder, or a run folder: then its ``last``, else its newest ``checkpoint-N``.

    Raises:
        CheckpointError: nothing there, with the places looked at.
    """
    place = Path(path).expanduser()
    numbered = [folder for folder in place.glob("checkpoint-*") if folder.name.partition("-")[2].isdigit()]
    newest = sorted(numbered, key=lambda folder: -int(folder.name.partition("-")[2]))
    for folder in (place, place / "last", *newest):
        if (folder / ADAPTER_FILE).is_file() and (folder / ADAPTER_CONFIG).is_file():
            return folder
    raise CheckpointError(
        f"No adapter at `{place}`: there is no {ADAPTER_FILE} with {ADAPTER_CONFIG} in it, in its `last` or "
        f"in its checkpoint-N folders{'' if place.exists() else ' (the path does not exist)'}. "
        "Give the run folder or one of its checkpoints."
    )


def adapter_sha256(folder: Path) -> str:
    """Identify an adapter by the bytes of its two files."""
    digest = hashlib.sha256()
    for name in (ADAPTER_CONFIG, ADAPTER_FILE):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def trained_on(folder: Path) -> str:
    """Return the fingerprint of the base an adapter was trained on; empty where nothing tells it."""
    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("base_fingerprint", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def load_adapter(path: str | Path, model: PreTrainedModel, *, check_base: bool = True) -> PeftModel:
    """Put a saved adapter into a model.

    Args:
        path: as for `find_adapter`.
        model: the base, mutated: its adapted layers are wrapped.
        check_base: refuse an adapter whose run names another base.

    Returns:
        The model with the adapter, in evaluation mode; the adapter is float32.

    Raises:
        CheckpointError: nothing there, damaged, no plain LoRA, of another shape, or trained on another base.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    folder = find_adapter(path)
    _check_config(folder)
    if check_base:
        _check_base(folder, model)
    try:
        weights = load_file(folder / ADAPTER_FILE)
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT asks for a property that transformers renamed
            adapted = cast("PeftModel", get_peft_model(model, config))
            expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            _check_names(folder, set(weights), set(expected))
            set_peft_model_state_dict(adapted, weights)
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"The adapter in `{folder}` cannot be used: {str(error).strip().splitlines()[0]}. It is damaged, "
            "or was made for a model of another shape. Load it with the base it was trained on."
        ) from error
    return cast("PeftModel", adapted.eval())


def _check_config(folder: Path) -> None:
    file = folder / ADAPTER_CONFIG
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{file} is no valid JSON ({error}). Copy it from the training run again."
        ) from None
    foreign = {
        key: stored.get(key, plain)
        for key, plain in PLAIN_LORA.items()
        if (stored.get(key) or plain) != plain
    }
    if foreign:
        listed = ", ".join(f"{key} = {value!r}" for key, value in foreign.items())
        rules = ", ".join(f"{key} = {PLAIN_LORA[key]!r}" for key in foreign)
        raise CheckpointError(
            f"{file} has {listed}, but only plain LoRA ({rules}) is supported. Merge it with PEFT, or train "
            "an adapter with `glmtune train +recipe=lora`."
        )


def _check_names(folder: Path, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, leftover = sorted(expected - found), sorted(found - expected)
        raise CheckpointError(
            f"{folder / ADAPTER_FILE} does not fit the model: {len(missing)} tensors are missing "
            f"({', '.join(missing[:4]) or 'none'}) and {len(leftover)} have no place "
            f"({', '.join(leftover[:4]) or 'none'}). Load it with the base it was trained on."
        )


def _source_family(folder: Path) -> Family | None:
    """Return the release line of the base an adapter was trained on, None where its name tells none."""
    stored = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return family_of_source(str(stored.get("base_model_name_or_path") or ""))


def _check_base(folder: Path, model: PreTrainedModel) -> None:
    expected, fingerprint = trained_on(folder), getattr(model, "fingerprint", None)
    if not expected or fingerprint is None:
        return
    is_base = getattr(model, "is_base", lambda trained: trained == fingerprint())
    if is_base(expected):
        return
    if getattr(model, "parent_is_unknown", False) and _source_family(folder) in (None, model.family):
        LOGGER.warning(
            "The adapter %s was trained on another checkpoint; `%s` is quantized and does not say from which "
            "weights, so whether they belong together cannot be checked.",
            folder, getattr(model, "source", ""),
        )  # fmt: skip
    else:
        raise CheckpointError(
            f"The adapter `{folder}` was trained on another base, with fingerprint {expected[:16]}, but the "
            f"model `{getattr(model, 'source', '')}` has {fingerprint()[:16]}. Load the base it was trained "
            "on, or (in Python) pass `check_base=False` to use it all the same."
        )
