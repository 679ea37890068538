"""Quantization by other libraries, through transformers' own quantizers: for GPUs, on loading only."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
from typing import Any, cast

import torch

from glmtune.errors import ConfigError
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.models.devices import choose_device
from glmtune.models.later import LaterModel
from glmtune.models.load import GlmModel, load_official
from glmtune.quantization.arithmetic.methods import EXTERNAL


def load_external(source: Any, method: str, *, device: Any = None, **options: Any) -> GlmModel:
    """Load a base and let another library quantize its linear layers.

    The unquantized weights are in host memory while that happens, so there must be room for them; what
    `glmtune.quantization.files.quantize_on_load` does needs little more than the codes.

    Args:
        source: see `glmtune.models.load.load_official`; an unquantized checkpoint.
        method: a name in ``EXTERNAL``.
        device: where the model will be.
        **options: see `glmtune.models.load.load_official`.

    Returns:
        The model in evaluation mode; embedding and head stay as they are. Prefixes and adapters of the
        unquantized base fit it.

    Raises:
        ConfigError: the library is not installed, or there is no GPU; see `load_official` too.
        CheckpointError: the checkpoint is quantized already, or damaged.
    """
    chosen, place = EXTERNAL[method], choose_device(device)
    check_external(method, place)
    plain: Any = load_official(source, device="cpu", **options)
    parent = plain.fingerprint()
    # transformers quantizes while it loads, and reads names of its own model only. Official checkpoints have
    # others, so our model is loaded first and its tensors handed over instead of a folder.
    model: Any = type(plain).from_pretrained(
        None,
        config=plain.config,
        state_dict=plain.state_dict(),
        quantization_config=quantizer_config(method, plain.dtype),
        dtype=plain.dtype,
        device_map={"": place},
    )
    model.source, model.generation_config = plain.source, plain.generation_config
    if isinstance(model, LaterModel):
        model.rebuild_rotary()  # loading in bfloat16 rounds its table
    model.stored_layout = QuantizedLayout(chosen.bits, method=method, source_fingerprint=parent)
    # The weights cannot be read back from other libraries' layouts, so the fingerprint is that of parent and
    # method.
    model.fingerprint = functools.partial(_fingerprint, method, parent)
    return cast(GlmModel, model.eval())


def check_external(method: str, device: torch.device) -> None:
    """Refuse a method whose library or device is missing.

    Args:
        method: a name in ``EXTERNAL``.
        device: where the model will be.

    Raises:
        ConfigError: naming what is missing.
    """
    chosen = EXTERNAL[method]
    if chosen.needs_gpu and device.type != "cuda":
        raise ConfigError(
            f"`quantization` is `{method}`, which {chosen.library} computes on CUDA GPUs only, but the model "
            f"is to be on `{device.type}`. Use `quantization=int4-g64` (any device), or a machine with a GPU."
        )
    if importlib.util.find_spec(chosen.library) is None:
        raise ConfigError(
            f"`quantization` is `{method}`, which needs the package `{chosen.library}`, and it is not "
            f"installed. Run `pip install {chosen.library}`, or use `quantization=int4-g64`, which needs "
            "nothing."
        )


def quantizer_config(method: str, dtype: torch.dtype) -> Any:
    """Return the settings of the quantizer that transformers is to run.

    Args:
        method: a name in ``EXTERNAL``, its library installed.
        dtype: floating type of the products.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if method == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
    )

    if method == "torchao-int8":
        return TorchAoConfig(quant_type=Int8WeightOnlyConfig())
    # The tiles of PyTorch's own INT4 product for GPUs, as older versions of torchao have it. The format
    # that 0.18 takes by default needs a further package, mslk, and raises ImportError without it.
    fields = {field.name for field in dataclasses.fields(Int4WeightOnlyConfig)}
    how = {"int4_packing_format": "tile_packed_to_4d"} if "int4_packing_format" in fields else {}
    return TorchAoConfig(quant_type=Int4WeightOnlyConfig(group_size=128, **how))


def _fingerprint(method: str, parent: str) -> str:
    return hashlib.sha256(f"{method} of {parent}".encode()).hexdigest()
