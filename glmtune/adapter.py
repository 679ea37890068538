"""Low-rank adapters as PEFT saves them: find one, check that it belongs to a base, put it into the model."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from glmtune.errors import CheckpointError
from glmtune.models.releases.source import family_of_source
from glmtune.tuned_files import TrainedOn, check_same_base, find_tuned

if TYPE_CHECKING:
    from peft import PeftModel

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
    return find_tuned(
        path, (ADAPTER_FILE, ADAPTER_CONFIG), what="adapter", absent=f"{ADAPTER_FILE} with {ADAPTER_CONFIG}"
    ).parent


def adapter_sha256(folder: Path) -> str:
    """Identify an adapter by the bytes of its two files."""
    digest = hashlib.sha256()
    for name in (ADAPTER_CONFIG, ADAPTER_FILE):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def trained_on(folder: Path) -> TrainedOn:
    """Return which base an adapter was trained on: PEFT's file names it, the run's manifest identifies it."""
    stored = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    source = str(stored.get("base_model_name_or_path") or "")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return TrainedOn(str(manifest.get("base_fingerprint", "")), source)
    except (OSError, ValueError, AttributeError):  # no run of ours made it, or its manifest was edited
        return TrainedOn("", source)


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
        base = trained_on(folder)
        family = family_of_source(base.source)  # None: a name that tells no release, such as a folder
        check_same_base(f"adapter `{folder}`", base, model, may_belong=lambda: family in (None, model.family))
    try:
        weights = load_file(folder / ADAPTER_FILE)
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = True
        # The steps of PeftModel.from_pretrained, which would only warn of missing tensors: here names are
        # compared before anything is set. Embeddings are left out, as no adapter of ours changes them.
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
    return adapted.eval()


def _check_config(folder: Path) -> None:
    """Refuse what merging and export could not express as one product of two matrices per layer."""
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
