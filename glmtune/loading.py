"""The loaders of the public interface: a base (also quantized), with or without a prefix; its tokenizer.

Each adds one thing to the one below it::

    load_model     products made fast for inference
    load_tuned     the prefix
    load_base      quantization, ours or another library's
    load_official  (glmtune.models.load) the checkpoint as it is
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glmtune.models.checkpoints.config import read_config
from glmtune.models.load import GlmModel, load_official
from glmtune.models.releases.families import Family, detect_family, detect_tokenizer_family, parse_family
from glmtune.models.releases.source import family_of_source, resolve_source
from glmtune.models.tokenizers.load import load_tokenizer_folder
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.checkpoint import load_prefix
from glmtune.prefix.encoder import PrefixEncoder
from glmtune.quantization.arithmetic.methods import EXTERNAL
from glmtune.quantization.files.external import load_external
from glmtune.quantization.files.quantize_on_load import QuantizingReader
from glmtune.quantization.kernels.dispatch import prepare_for_inference
from glmtune.quantization.layers.linear import QuantizedLinear


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantization: str | None = None,
    quantization_activations: str | None = None,
    prefix: PrefixEncoder | str | Path | None = None,
    family: Family | str | None = None,
    check_base: bool = True,
) -> PreTrainedModel:
    """Load a GLM for generation or further work; no code of the checkpoint runs.

    Args:
        source: preset name (``glm-tiny``, ``chatglm2-6b``, ...), hub id (THUDM/, zai-org/), or a folder.
        dtype: torch type, its name, or None / "auto" for the checkpoint's own where it runs well.
        device: torch device, its name, or None / "auto" for CUDA if there is one.
        quantization: None loads the weights as they are stored, quantized checkpoints included; a name of
            METHODS in `glmtune.quantization.arithmetic.methods` (``int8``, ``int4``, ``int4-g64``, ...)
            quantizes them as they are read, tensor by tensor; one of EXTERNAL there (``nf4``,
            ``torchao-int4``, ...) leaves it to another library, for GPUs.
        quantization_activations: ``int8`` also rounds the inputs of quantized layers; None leaves them.
        prefix: a prefix to attach: an encoder, a run folder, a checkpoint folder, or a file (ours, or an
            official ``pytorch_model.bin``).
        family: release line, only where no name tells it, such as ``chatglm2-32k``.
        check_base: refuse a prefix file that names another base than this one.

    Returns:
        The model in evaluation mode. Quantized layers have the fastest product there is for them; a cast or
        a move takes it away, and `glmtune.quantization.kernels.dispatch.prepare_for_inference` gives it back.

    Raises:
        ConfigError: unknown source, dtype, device, family or quantization; no such CUDA device; the
            checkpoint is quantized in another way than asked for.
        CheckpointError: the checkpoint or the prefix is damaged, or they do not fit each other.
        ShapeError: an encoder was made for another geometry.
    """
    options: dict[str, Any] = {"dtype": dtype, "device": device, "family": family}
    model = load_tuned(source, quantization=quantization, prefix=prefix, check_base=check_base, **options)
    # Last: the fast products hold the codes in an order of their own and join neighbouring layers,
    # which a prefix, an adapter or a cast coming later would not find as they expect them.
    has_codes = any(isinstance(module, QuantizedLinear) for module in model.modules())
    if has_codes or quantization_activations is not None:
        prepare_for_inference(model, activations=quantization_activations)
    return model


def load_tuned(
    source: str | Path,
    *,
    prefix: PrefixEncoder | str | Path | None,
    check_base: bool = True,
    **options: Any,
) -> GlmModel:
    """Load a base with its prefix, not yet prepared for inference, for callers that add an adapter before.

    Args:
        source: see `load_model`.
        prefix: see `load_model`.
        check_base: see `load_model`.
        **options: of `load_base`.

    Returns:
        The model in evaluation mode.

    Raises:
        ConfigError: see `load_model`; so are CheckpointError and ShapeError.
    """
    model = load_base(source, **options)
    if prefix is not None:
        if not isinstance(prefix, PrefixEncoder):
            prefix = load_prefix(prefix, model, check_base=check_base)
        attach_prefix(model, prefix)
    return model


def load_base(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    family: Family | str | None = None,
    attn_implementation: str | None = None,
    quantization: str | None = None,
) -> GlmModel:
    """Load a base model, quantized or not: `load_official` with the means to quantize.

    Args:
        source: preset name, hub id or folder.
        dtype: floating type; codes and scales keep theirs.
        device: where the model will be.
        family: release line, None to detect it.
        attn_implementation: a name transformers knows.
        quantization: see `load_model`.

    Returns:
        The model in evaluation mode; a quantized one has `QuantizedLinear` layers.

    Raises:
        ConfigError: see `load_model`; so is CheckpointError.
    """
    options: dict[str, Any] = {"dtype": dtype, "device": device, "family": family}
    options["attn_implementation"] = attn_implementation
    if quantization in EXTERNAL:
        return load_external(source, quantization, **options)
    return load_official(source, quantizer=QuantizingReader(quantization), **options)


def load_tokenizer(source: str | Path, *, family: Family | str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Args:
        source: as for `load_model`; a folder may hold the tokenizer's files alone.
        family: release line, only where no name tells it.

    Returns:
        A transformers tokenizer; it pads on the left.

    Raises:
        ConfigError: unknown source or family.
        CheckpointError: the tokenizer's files are missing, damaged or of a family without support.
    """
    folder = resolve_source(source)
    chosen = parse_family(family) if family is not None else family_of_source(source)
    if chosen is None:
        has_model = (folder / "config.json").is_file()
        chosen = detect_family(folder, read_config(folder)) if has_model else detect_tokenizer_family(folder)
    return load_tokenizer_folder(folder, chosen)
