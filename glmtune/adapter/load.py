"""Find a saved adapter, check that it belongs to a base, put it into the model."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from glmtune.adapter.config import AdapterConfig, read_adapter_config
from glmtune.adapter.official import named_officially, official_shapes, to_native
from glmtune.errors import CheckpointError
from glmtune.models.checkpoints.finite import first_not_finite
from glmtune.models.checkpoints.headers import records_of
from glmtune.models.checkpoints.shards import OpenShards
from glmtune.models.releases.source import family_of_source
from glmtune.storage.json_files import read_json_object, shown
from glmtune.storage.manifest import MANIFEST
from glmtune.switch.files import SWITCH_FILE, read_switch
from glmtune.switch.model import attach_switch
from glmtune.tuned_files import ADAPTER_CONFIG, TrainedOn, check_same_base, find_tuned

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER_FILE, ADAPTER_BIN = "adapter_model.safetensors", "adapter_model.bin"
"""Ours and PEFT's today; and PEFT's until 2023, read by the places of its tensors: no pickle is run."""
PEFT_PREFIX = "base_model.model."
"""What PEFT's files have in front of the names of the model's layers."""


def find_adapter(path: str | Path) -> Path:
    """Find the folder of a saved adapter.

    Args:
        path: that folder, or a run folder: then its ``last``, else its newest ``checkpoint-N``.

    Raises:
        CheckpointError: nothing there, with the places looked at.
    """
    return find_tuned(
        path,
        (ADAPTER_FILE, ADAPTER_CONFIG),
        (ADAPTER_BIN, ADAPTER_CONFIG),
        what="adapter",
        absent=f"{ADAPTER_FILE} with {ADAPTER_CONFIG}",
    ).parent


def _weights_file(folder: Path) -> Path:
    """Return the file that holds the tensors, as `find_adapter` prefers it."""
    return next(file for name in (ADAPTER_FILE, ADAPTER_BIN) if (file := folder / name).is_file())


def adapter_files(folder: Path) -> tuple[Path, Path]:
    """Return the file that describes an adapter and the one of its tensors."""
    return folder / ADAPTER_CONFIG, _weights_file(folder)


def adapter_sha256(folder: Path) -> str:
    """Identify an adapter by the bytes of its two files, and of its switch if it has one."""
    digest, switch = hashlib.sha256(), folder / SWITCH_FILE
    for file in (*adapter_files(folder), *[switch] * switch.is_file()):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def trained_on(folder: Path) -> TrainedOn:
    """Return which base an adapter was trained on: PEFT's file names it, the run's manifest identifies it.

    The name is compared and shown; nothing is loaded or fetched by it.
    """
    named = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    source = named if isinstance(named, str) else ""
    if not (folder / MANIFEST).is_file():  # no run of ours made it
        return TrainedOn("", source)
    fingerprint = read_json_object(folder / MANIFEST).get("base_fingerprint", "")
    if not isinstance(fingerprint, str):
        raise CheckpointError(
            f"{folder / MANIFEST} says base_fingerprint = {shown(fingerprint)}, but it must be a text. Take "
            "the file from the training run again."
        )
    return TrainedOn(fingerprint, source)


def load_adapter(
    path: str | Path, model: PreTrainedModel, *, check_base: bool = True, scale: float = 1.0
) -> PeftModel:
    """Put a saved adapter into a model.

    PEFT only builds the layers: what the files say is read and checked here, and the tensors' names and
    shapes are compared with the model's layers before anything is built, so no file decides how much memory
    is taken.

    Args:
        path: as for `find_adapter`.
        model: the base, mutated: its adapted layers are wrapped.
        check_base: refuse an adapter whose run names another base.
        scale: see `set_scale`.

    Returns:
        The model with the adapter, in evaluation mode; the adapter is float32. Where a ``switch.safetensors``
        lies beside it, the model obeys that.

    Raises:
        CheckpointError: nothing there, damaged, no plain LoRA, of another shape, not finite, or trained on
            another base.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    folder = find_adapter(path)
    config, switch = check_adapter(folder, model, check_base=check_base), read_switch(folder)
    layers = {name: layer for name, layer in model.named_modules() if _is_linear(layer)}
    file = _weights_file(folder)
    names = {name: name for name in config.adapted(layers)}
    official = {} if names else named_officially(config, model.config, layers)
    if official:
        shapes = official_shapes(config, official, layers, PEFT_PREFIX)
        weights = to_native(_read_weights(file, shapes), official, model.config, PEFT_PREFIX)
        names = {layer: name for name, native in official.items() for layer in native}
    else:
        weights = _read_weights(file, _expected(config, layers, list(names)))
    # The steps of PeftModel.from_pretrained, which would only warn of missing tensors. Embeddings are left
    # out, as no adapter of ours changes them.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks for a property that transformers renamed
        adapted = cast("PeftModel", get_peft_model(model, _peft_config(config, names)))
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        assert set(weights) == set(expected), "PEFT built other layers than were worked out"
        _give_memory(adapted)
        set_peft_model_state_dict(adapted, weights)
    if switch is not None:
        attach_switch(adapted, switch)
    set_scale(adapted, scale)
    return adapted.eval()


def set_scale(adapted: nn.Module, scale: float) -> None:
    """Multiply what LoRA adds to its layers: W + scale * (alpha / rank) * B * A.

    Args:
        adapted: a model with an adapter, mutated.
        scale: 1 is the adapter as its files have it, whatever was set before; 0 the base.
    """
    for layer in adapted.modules():
        scale_layer(layer, scale)


def scale_layer(layer: nn.Module, scale: float) -> None:
    """Do for one layer what `set_scale` does; other layers than LoRA's are left as they are."""
    for name in getattr(layer, "lora_A", ()):
        layer.set_scale(name, scale)  # pyright: ignore[reportCallIssue]  # PEFT's: times alpha / rank (or its root)


def _give_memory(adapted: PeftModel) -> None:
    """Put the adapter's weights where the model computes, their values to be set.

    PEFT puts them where a layer's weight lies. That of a quantized layer which is prepared for inference is a
    placeholder without memory, its codes being held in another order; what is loaded there is lost silently.
    """
    device = adapted.get_input_embeddings().weight.device
    layers: list[Any] = [layer for layer in adapted.modules() if hasattr(layer, "lora_A")]
    for layer in layers:
        own = [tensor for tensor in (*layer.parameters(), *layer.buffers()) if not tensor.is_meta]
        for part in (*layer.lora_A.values(), *layer.lora_B.values()):
            if part.weight.is_meta:
                part.to_empty(device=own[0].device if own else device)


def check_adapter(folder: Path, model: PreTrainedModel, *, check_base: bool = True) -> AdapterConfig:
    """Read what an adapter asks for; refuse one that is no plain LoRA, or was trained on another base.

    Args:
        folder: as found by `find_adapter`.
        model: the base.
        check_base: see `load_adapter`.

    Raises:
        CheckpointError: it is refused.
    """
    config = read_adapter_config(folder / ADAPTER_CONFIG)
    if check_base:
        base = trained_on(folder)
        family = family_of_source(base.source)  # None: a name that tells no release, such as a folder
        check_same_base(f"adapter `{folder}`", base, model, may_belong=lambda: family in (None, model.family))
    return config


def fitting_weights(folder: Path, adapted: PeftModel) -> dict[str, Tensor]:
    """Read the tensors of an adapter that was saved from a model with the same adapters.

    Args:
        folder: holds the adapter.
        adapted: the model.

    Returns:
        The tensors by their names in the file.

    Raises:
        CheckpointError: the file is damaged, or its layers or ranks are others.
    """
    from peft import get_peft_model_state_dict

    if not (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{folder / ADAPTER_FILE} cannot be read: it is not there. The folder holds something else than "
            "an adapter; go on with the settings it was made with."
        )
    there, now = read_adapter_config(folder / ADAPTER_CONFIG).rank, adapted.peft_config["default"]
    if there != getattr(now, "r", there):
        raise CheckpointError(
            f"{folder} holds an adapter of rank {there}, but the run has {getattr(now, 'r', None)}: its "
            "`lora.rank` is another. Go on with the settings it was made with."
        )
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return _read_weights(_weights_file(folder), {name: tuple(w.shape) for name, w in expected.items()})


def _is_linear(layer: nn.Module) -> bool:
    """Tell whether a layer multiplies by a matrix; quantized ones, of any library, have these attributes."""
    return isinstance(getattr(layer, "in_features", None), int) and hasattr(layer, "weight")


def _expected(
    config: AdapterConfig, layers: Mapping[str, Any], adapted: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that a configuration asks for in a model."""
    if not adapted:
        raise CheckpointError(
            f"{config.file}: target_modules is {shown(list(config.targets))}, but the model has no such "
            f"linear layer. Its layers end in {', '.join(sorted({n.rpartition('.')[2] for n in layers}))}. "
            "Load the adapter with the base it was trained on."
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for name in adapted:
        rank = config.rank_of(name)
        shapes[f"{PEFT_PREFIX}{name}.lora_A.weight"] = (rank, layers[name].in_features)
        shapes[f"{PEFT_PREFIX}{name}.lora_B.weight"] = (layers[name].out_features, rank)
    return shapes


def _read_weights(file: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read the tensors of an adapter, whose names and shapes are compared with the expected ones first."""
    with OpenShards() as shards:
        records = {record.name: record for record in records_of(file, shards.stream(file))}
        _check_names(file, set(records), set(expected))
        wrong = [
            f"{name} is {list(record.shape)} of {record.dtype}, but {list(expected[name])} of a floating type"
            for name, record in records.items()
            if record.shape != expected[name] or not record.dtype.is_floating_point
        ]
        if wrong:
            raise CheckpointError(
                f"{file} does not fit the model and {ADAPTER_CONFIG}: {'; '.join(wrong[:4])} is expected"
                f"{' (and more)' if len(wrong) > 4 else ''}. Load it with the base it was trained on."
            )
        weights = {name: shards.read(record) for name, record in records.items()}
    if (name := first_not_finite(weights.items())) is not None:
        raise CheckpointError(
            f"{file} holds numbers that are not finite (NaN or infinity), first in {name}: it was saved by a "
            "run that had diverged, or is damaged. Take an earlier checkpoint of the run."
        )
    return weights


def _peft_config(config: AdapterConfig, adapted: Mapping[str, str]) -> LoraConfig:
    """Make PEFT's configuration of checked values; of the file's own words none is in it.

    Args:
        config: from the file.
        adapted: names of the layers in the model, each with its name in the file.
    """
    from peft import LoraConfig

    # PEFT runs the keys of patterns as regular expressions: these are full names, escaped by us.
    ranks = {re.escape(name): config.rank_of(own) for name, own in adapted.items() if config.ranks}
    alphas: dict[str, Any] = {
        re.escape(name): config.alpha_of(own) for name, own in adapted.items() if config.alphas
    }
    return LoraConfig(
        r=config.rank,
        lora_alpha=cast("int", config.alpha),  # PEFT takes fractions as well
        use_rslora=config.by_root_of_rank,
        target_modules=list(adapted),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def _check_names(file: Path, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, leftover = sorted(expected - found), sorted(found - expected)
        raise CheckpointError(
            f"{file} does not fit the model: {len(missing)} tensors are missing "
            f"({', '.join(missing[:4]) or 'none'}) and {len(leftover)} have no place "
            f"({', '.join(leftover[:4]) or 'none'}). Load it with the base it was trained on."
        )
