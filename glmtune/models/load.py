"""Load an official checkpoint: `load_official` goes from a name to a model, step by step."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor
from transformers import GlmConfig

from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.checkpoints.config import native_config, read_config
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.models.checkpoints.quantizer import Quantizer
from glmtune.models.checkpoints.reading import read_into
from glmtune.models.checkpoints.shards import read_records
from glmtune.models.official import OfficialChatGlmForCausalLM, OfficialGlmForCausalLM
from glmtune.models.releases.families import Family, detect_family, parse_family
from glmtune.models.releases.source import family_of_source, resolve_source
from glmtune.models.settings import DTYPES
from glmtune.settings import check_choice

GlmModel = OfficialGlmForCausalLM | OfficialChatGlmForCausalLM
"""A base model of any generation."""

SMALL_MODEL_PARAMETERS = 1_000_000_000
"""Below this many, float16 checkpoints run in float32 on a CPU; above, in bfloat16: there float32 would take
twice the file's size, 25 GB for 6B."""


def load_official(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    family: str | Family | None = None,
    attn_implementation: str | None = None,
    quantizer: Quantizer | None = None,
) -> GlmModel:
    """Load a base model; weights pass through memory once and no code of the checkpoint runs.

    Callers who may be given a quantized checkpoint use `glmtune.loading.load_base`, which brings a quantizer.

    Args:
        source: preset name, hub id under THUDM/ or zai-org/, or a folder.
        dtype: torch type, its name, or None / "auto": the checkpoint's own type, except that on a CPU float16
            becomes float32 below a billion parameters and bfloat16 above (CPUs are slow in float16).
        device: torch device, its name, or None / "auto": CUDA if there is one, else the CPU.
        family: release line, where no name tells it; None detects it.
        attn_implementation: a name transformers knows ("sdpa", "eager", ...); None takes its default.
        quantizer: makes layers of codes, where the checkpoint holds them or they are to be made on reading.

    Returns:
        The model in evaluation mode, all parameters trainable, with `family`, `source` and `fingerprint()`:
        an `OfficialChatGlmForCausalLM` for ChatGLM-6B, an `OfficialGlmForCausalLM` for all later releases.

    Raises:
        ConfigError: unknown source, dtype or device; CUDA asked for where there is none.
        CheckpointError: the checkpoint is incomplete, damaged, or of an architecture not supported; it is
            quantized and there is no ``quantizer``.
    """
    # 1. What costs nothing to refuse comes first: device, source, config.json, codes without a quantizer.
    target = choose_device(device)
    folder = resolve_source(source)
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

    # 2. On the meta device layers have shapes but no memory, and no time goes into random first weights.
    with torch.device("meta"):
        model = build_model(config)
    resolved_dtype = choose_dtype(dtype, target, stored=config.dtype, num_parameters=model.num_parameters())

    # 3. From here there are two configurations: what the files hold, and what the model will be. The model
    #    keeps the object it was built from, so reading gets a copy of how that was before dtype and layout go
    #    into it.
    checkpoint_config = copy.copy(config)
    model.config.dtype = resolved_dtype

    # 4. Quantized layers take the place of linear ones while both are without memory; afterwards the peak
    #    would be the unquantized model.
    if quantizer is not None and model_layout is not None:
        model_layout.put_into(model.config)
        with torch.device("meta"):
            quantizer.replace(model, model_layout)

    # 5. Memory, in the final type and on the final device, so that nothing is cast or moved after reading. It
    #    comes tensor by tensor: a tied head got its own just now, and has to be made the embedding's again.
    model._apply(lambda tensor: _allocated(tensor, resolved_dtype, target))
    model.tie_weights()
    if isinstance(model, OfficialGlmForCausalLM):
        model.rebuild_rotary()  # a buffer, which no file fills: allocated above, it holds garbage

    # 6. The weights, each read once. The quantizer sees them only where it is to make codes; stored codes are
    #    read like any tensor.
    quantizes = model_layout is not None and stored_layout is None
    read_into(model, folder, checkpoint_config, quantizer if quantizes else None)
    if quantizer is not None:
        quantizer.check(model)
    model.source = str(source)
    return model.eval()


def _allocated(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for a tensor of the meta device; codes keep their type."""
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, dtype=dtype, device=device)


def build_model(config: GlmConfig | ChatGlmConfig) -> GlmModel:
    """Build the model of a configuration with fresh weights.

    Args:
        config: as made by `native_config`.
    """
    is_first = isinstance(config, ChatGlmConfig)
    return OfficialChatGlmForCausalLM(config) if is_first else OfficialGlmForCausalLM(config)


def load_config(
    source: str | Path, folder: Path, family: str | Family | None = None
) -> GlmConfig | ChatGlmConfig:
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


def choose_device(device: str | torch.device | None) -> torch.device:
    """Turn a setting into a device that exists.

    Raises:
        ConfigError: not a device, or a CUDA device this machine does not have.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(
            f"`model.device` is `{device}`, but it must be auto, cpu, cuda or cuda:N."
        ) from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise ConfigError(
            f"`model.device` is `{device}`, but PyTorch sees {count} CUDA devices here. "
            "Use `model.device=cpu`, or `auto`, or install a PyTorch build for your GPU."
        )
    return chosen


def choose_dtype(
    dtype: str | torch.dtype | None,
    device: torch.device,
    *,
    stored: str | torch.dtype | None,
    num_parameters: int,
) -> torch.dtype:
    """Turn a setting into the floating type to load.

    Args:
        dtype: torch type, its name, or None / "auto".
        device: where the model will run.
        stored: the checkpoint's own type.
        num_parameters: of the model; decides what float16 becomes on a CPU.

    Raises:
        ConfigError: not one of float32, bfloat16, float16.
    """
    if dtype is not None and dtype != "auto":
        name = str(dtype).removeprefix("torch.")
        check_choice("model.dtype", name, DTYPES)
        return getattr(torch, name)
    own = getattr(torch, str(stored or torch.float32).removeprefix("torch."))
    if device.type == "cpu" and own == torch.float16:
        return torch.float32 if num_parameters < SMALL_MODEL_PARAMETERS else torch.bfloat16
    return own
