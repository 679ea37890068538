"""Load an official checkpoint: `load_official` goes from a name to a model, step by step."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Glm4Config, GlmConfig

from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.checkpoints.config import PER_HEAD_KEY, NativeConfig, native_config
from glmtune.models.checkpoints.config_rules import is_other, read_config
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.models.checkpoints.quantizer import Quantizer
from glmtune.models.checkpoints.reading import fill_model, open_weights
from glmtune.models.checkpoints.shards import is_verifying, read_records
from glmtune.models.devices import choose_device, choose_dtype
from glmtune.models.generation import release_generation
from glmtune.models.later import LaterModel, OfficialGlm4ForCausalLM, OfficialGlmForCausalLM
from glmtune.models.official import OfficialChatGlmForCausalLM
from glmtune.models.other import load_other
from glmtune.models.placement import Placement, allocate, dispatch, plan_placement
from glmtune.models.releases.families import Family, detect_family, parse_family
from glmtune.models.releases.source import family_of_source, resolve_source
from glmtune.storage.manifest import check_files

GlmModel = OfficialGlmForCausalLM | OfficialGlm4ForCausalLM | OfficialChatGlmForCausalLM
"""A base model of any generation."""

NOT_OF_THE_MODEL = ("optimizer", "scheduler", "scaler", "rng_state", "zero", "trainer_state", "loss_state")
"""What the names begin with of files that a checkpoint of training holds besides a model."""


def load_official(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    family: str | Family | None = None,
    attn_implementation: str | None = None,
    quantizer: Quantizer | None = None,
    placement: Placement | None = None,
) -> GlmModel:
    """Load a base model; weights pass through memory once and no code of the checkpoint runs.

    Callers who may be given a quantized checkpoint use `glmtune.loading.load_base`, which brings a quantizer.

    Args:
        source: preset name, hub id under THUDM/ or zai-org/, or a folder.
        dtype: torch type, its name, or None / "auto": the checkpoint's own type, except that on a CPU float16
            becomes float32 below a billion parameters and bfloat16 above (CPUs are slow in float16).
        device: torch device, its name, or None / "auto": an accelerator if there is one, else the CPU.
        family: release line, where no name tells it; None detects it.
        attn_implementation: a name transformers knows ("sdpa", "eager", ...); None takes its default.
        quantizer: makes layers of codes, where the checkpoint holds them or they are to be made on reading.
        placement: how the model is split over several devices, whose first replaces ``device``; None: it is
            not.

    Returns:
        The model in evaluation mode, all parameters trainable, with `family`, `source` and `fingerprint()`:
        an `OfficialChatGlmForCausalLM` for ChatGLM-6B, an `OfficialGlmForCausalLM` for all later releases.

    Raises:
        ConfigError: unknown source, dtype or device; CUDA asked for where there is none.
        CheckpointError: the checkpoint is incomplete, damaged, or of an architecture not supported; it is
            quantized and there is no ``quantizer``.
    """
    # 1. What costs nothing to refuse comes first: device, source, config.json, codes without a quantizer.
    target = choose_device(device) if placement is None else placement.first
    folder = resolve_source(source)
    check_written(folder)
    if is_other(stored := read_config(folder)):
        return _load_other(source, folder, stored, (dtype, target, attn_implementation), quantizer, placement)
    config = load_config(source, folder, family)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    stored_layout = QuantizedLayout.of(config)
    if stored_layout is not None and quantizer is None:
        raise CheckpointError(
            f"{folder} is quantized ({stored_layout.bits} bits), but this function loads floating point "
            "weights only. Use `glmtune.load_model` or `glmtune.loading.load_base`."
        )
    model_layout = None if quantizer is None else quantizer.layout(stored_layout, config)

    # 2. Headers next: a config.json may ask for a million blocks, and none is built that the weights lack.
    with open_weights(folder, config) as weights:
        # 3. On the meta device layers have shapes but no memory, and no time goes into random first weights.
        with torch.device("meta"):
            model = build_model(config)
        count = model.num_parameters()
        resolved_dtype = choose_dtype(dtype, target, stored=config.dtype, num_parameters=count)

        # 4. From here there are two configurations: what the files hold, and what the model will be. The
        #    model keeps the object it was built from, so reading gets a copy of how that was before dtype and
        #    layout go into it.
        checkpoint_config = copy.copy(config)
        model.config.dtype = resolved_dtype

        # 5. Quantized layers take the place of linear ones while both are without memory; afterwards the peak
        #    would be the unquantized model.
        if quantizer is not None and model_layout is not None:
            model_layout.put_into(model.config)
            with torch.device("meta"):
                quantizer.replace(model, model_layout)

        # 6. Memory, in the final type and on the final device, so that nothing is cast or moved after
        #    reading. It comes tensor by tensor: a tied head got its own just now, and has to be made the
        #    embedding's again.
        parts = {"": target} if placement is None else plan_placement(model, placement, resolved_dtype)
        allocate(model, parts, resolved_dtype)
        model.tie_weights()
        if isinstance(model, LaterModel):
            model.rebuild_rotary()  # a buffer, which no file fills: allocated above, it holds garbage

        # 7. The weights, each read once. The quantizer sees them only where it is to make codes; stored codes
        #    are read like any tensor.
        quantizes = model_layout is not None and stored_layout is None
        fill_model(model, weights, checkpoint_config, quantizer if quantizes else None)
    if quantizer is not None:
        quantizer.check(model)
    model.source, model.stored_dtype = str(source), _floating(checkpoint_config.dtype)
    model.generation_config = release_generation(folder, model.config)
    return model.eval() if placement is None else dispatch(model.eval(), parts)


def _load_other(
    source: str | Path,
    folder: Path,
    stored: Mapping[str, Any],
    how: tuple[Any, torch.device, str | None],
    quantizer: Quantizer | None,
    placement: Placement | None,
) -> Any:
    """Load what is no GLM of ours; what only ours can is refused."""
    kind, (dtype, device, attn_implementation) = str(stored["model_type"]), how
    some_glm = GlmConfig()  # to ask whether codes are wanted at all
    setattr(some_glm, PER_HEAD_KEY, False)
    if quantizer is not None and quantizer.layout(None, some_glm) is not None:
        raise ConfigError(
            f"`quantization` is set, but {folder} has model_type `{kind}`, which glmtune does not compute "
            "itself, and so has no codes for. Leave it out."
        )
    if placement is not None:
        raise ConfigError(
            f"`device_map` is set, but {folder} has model_type `{kind}`, which is loaded to one device. "
            "Leave it out."
        )
    options: dict[str, Any] = {"dtype": dtype, "device": device, "attn_implementation": attn_implementation}
    model = load_other(source, folder, model_type=kind, **options)
    model.generation_config = release_generation(folder, model.config)
    return model


def check_written(folder: Path) -> None:
    """Make sure that a model which glmtune tuned, quantized or exported is as it was written.

    Others tell no checksums. Nothing is read where checksums are not to be compared (`verifying`).

    Raises:
        CheckpointError: a file is damaged.
    """
    # Of several processes one is enough: it reads every byte.
    if is_verifying() and os.environ.get("RANK", "0") == "0":
        present = (path.name for path in folder.iterdir() if path.is_file())
        check_files(folder, [name for name in present if not name.startswith(NOT_OF_THE_MODEL)])


def build_model(config: NativeConfig) -> GlmModel:
    """Build the model of a configuration with fresh weights.

    Args:
        config: as made by `native_config`.
    """
    if isinstance(config, ChatGlmConfig):
        return OfficialChatGlmForCausalLM(config)
    return (
        OfficialGlm4ForCausalLM(config) if isinstance(config, Glm4Config) else OfficialGlmForCausalLM(config)
    )


def load_config(source: str | Path, folder: Path, family: str | Family | None = None) -> NativeConfig:
    """Read a checkpoint's configuration in native form.

    Args:
        source: what the user named; a preset or hub id tells the family.
        folder: the resolved folder.
        family: release line, None to detect it.

    Raises:
        CheckpointError: see `native_config` and `detect_family`.
    """
    official = read_config(folder)
    # What the user says wins, then what a preset's or hub id's name tells, then the files.
    chosen = parse_family(family) if family is not None else family_of_source(source)
    try:
        config = native_config(official, chosen or detect_family(folder, official))
    except CheckpointError as error:
        where = "" if str(folder) in str(error) else f"{folder}{os.sep}"  # `config.json ...` in which folder
        raise CheckpointError(f"{where}{error}") from None
    if config.dtype is None:  # early files do not say it; the headers of the weights do
        stored = (record.dtype for record in read_records(folder).values())
        config.dtype = next((dtype for dtype in stored if dtype.is_floating_point), torch.float32)
    return config


def is_quantized(source: str | Path, family: str | None = None) -> bool:
    """Tell whether a checkpoint holds codes, by its config.json.

    Raises:
        ConfigError: see `load_official`; so is CheckpointError.
    """
    return QuantizedLayout.of(load_config(source, resolve_source(source), family)) is not None


def _floating(dtype: str | torch.dtype | None) -> torch.dtype | None:
    return None if dtype is None else getattr(torch, str(dtype).removeprefix("torch."))
