"""The loaders of the public interface: a base (also quantized), tuned or not, and its tokenizer.

Each adds one thing to the one below it::

    load_model     products made fast for inference; arguments that users of the releases type
    load_tuned     the prefix or the adapter
    load_base      quantization, ours or another library's
    load_official  (glmtune.models.load) the checkpoint as it is
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from glmtune.adapter import load_adapter
from glmtune.compat.arguments import check_typed
from glmtune.errors import ConfigError
from glmtune.models.checkpoints.shards import verifying
from glmtune.models.load import GlmModel, load_official
from glmtune.models.placement import Placement, parse_placement
from glmtune.models.releases.families import Family
from glmtune.models.settings import EMBEDDINGS
from glmtune.models.tokenizers.load import load_tokenizer
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.checkpoint import load_prefix
from glmtune.prefix.encoder import PrefixEncoder
from glmtune.quantization.arithmetic.methods import EXTERNAL
from glmtune.quantization.files.external import load_external
from glmtune.quantization.files.quantize_on_load import QuantizingReader
from glmtune.quantization.in_place import InPlaceQuantization
from glmtune.quantization.kernels.dispatch import prepare_for_inference
from glmtune.quantization.layers.embeddings import round_embeddings
from glmtune.quantization.layers.linear import QuantizedLinear
from glmtune.settings import check_choice, check_strengths

__all__ = ["load_base", "load_model", "load_model_on_gpus", "load_tokenizer", "load_tuned"]


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: object = None,
    quantization: str | None = None,
    quantization_activations: str | None = None,
    quantization_embeddings: str | None = None,
    prefix: PrefixEncoder | str | Path | None = None,
    prefix_strength: float = 1.0,
    adapter: str | Path | None = None,
    adapter_scale: float = 1.0,
    family: Family | str | None = None,
    check_base: bool = True,
    attn_implementation: str | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
    use_switch: bool = True,
    verify_checksums: bool = True,
    **typed: object,
) -> GlmModel:
    """Load a GLM for generation or further work; no code of the checkpoint runs.

    Args:
        source: preset name (``glm-tiny``, ``chatglm2-6b``, ...), hub id (THUDM/, zai-org/), or a folder.
        dtype: torch type, its name, or None / "auto" for the checkpoint's own where it runs well.
        device: torch device, its name, or None / "auto" for an accelerator if there is one.
        device_map: instead of ``device``: ``auto`` splits the model by layers over all devices there are;
            see `glmtune.models.placement.parse_placement`.
        quantization: None loads the weights as they are stored, quantized checkpoints included; a name of
            METHODS in `glmtune.quantization.arithmetic.methods` (``int8``, ``int4``, ``int4-g64``, ...)
            quantizes them as they are read, tensor by tensor; one of EXTERNAL there (``nf4``,
            ``torchao-int4``, ...) leaves it to another library, for GPUs.
        quantization_activations: ``int8`` also rounds the inputs of quantized layers; None leaves them.
        quantization_embeddings: ``int8`` rounds embedding and head to INT8 codes; None leaves them as they
            are stored.
        prefix: a prefix to attach: an encoder, a run folder, a checkpoint folder, or a file (ours, or an
            official ``pytorch_model.bin``).
        prefix_strength: how much the prefix counts wherever nothing else is asked for: 1 as it was tuned, 0
            not at all (the base), what lies between and beyond by log strength on the scores of its columns.
        adapter: a LoRA adapter to attach: a run folder, a checkpoint folder, or any folder that PEFT wrote,
            also of the official scripts.
        adapter_scale: what the adapter's product is multiplied by: 1 as it was tuned, 0 the base.
        family: release line, only where no name tells it, such as ``chatglm2-32k``.
        check_base: refuse a prefix or adapter that names another base than this one.
        attn_implementation: a name transformers knows (``sdpa``, ``eager``).
        max_memory: with ``device_map="auto"``: bytes, or text such as ``"20GiB"``, per device.
        use_switch: obey the switch of the prefix or adapter, if its file has one, which decides per prompt
            whether it applies; False: it applies to every prompt.
        verify_checksums: compare the checksums that pickles (``.bin``) and checkpoints of ours have, so that
            a file which was damaged is refused; False reads it as it is.
        **typed: what users of ``from_pretrained`` write besides (``torch_dtype``, ``load_in_8bit``,
            ``trust_remote_code``, ``revision``, ...), see `glmtune.compat.arguments`: obeyed, or refused with
            what to write instead.

    Returns:
        The model in evaluation mode. Quantized layers have the fastest product there is for them; a cast or
        a move takes it away until the model generates again.

    Raises:
        ConfigError: unknown source, dtype, device, family or quantization; no such device; the checkpoint is
            quantized in another way than asked for; a strength or scale below 0, or of nothing; an argument
            that means nothing here.
        CheckpointError: the checkpoint, the prefix or the adapter is damaged, or they do not fit each other.
        ShapeError: an encoder was made for another geometry.
    """
    options: dict[str, Any] = {"dtype": dtype, "device": device, "family": family}
    options |= {"quantization": quantization, "device_map": device_map, "max_memory": max_memory}
    options["quantization_embeddings"] = quantization_embeddings
    source, options = check_typed(source, options, typed)
    options |= {"check_base": check_base, "attn_implementation": attn_implementation}
    options |= {"prefix_strength": prefix_strength, "adapter_scale": adapter_scale}
    options["verify_checksums"] = verify_checksums
    model = load_tuned(source, prefix=prefix, adapter=adapter, use_switch=use_switch, **options)
    # Last: the fast products hold the codes in an order of their own and join neighbouring layers,
    # which a prefix, an adapter or a cast coming later would not find as they expect them.
    has_codes = any(isinstance(module, QuantizedLinear) for module in model.modules())
    if has_codes or quantization_activations is not None:
        prepare_for_inference(model, activations=quantization_activations)
        model.in_place_quantizer = InPlaceQuantization(quantization_activations)
        model.keep_products()
    return model


def load_model_on_gpus(
    source: str | Path, num_gpus: int | None = 2, device_map: object = None, **options: Any
) -> GlmModel:
    """Load a model split by layers over the GPUs of this machine, as the function of this name in the demos.

    Args:
        source: see `load_model`.
        num_gpus: how many; None: all there are. A machine that has fewer is told so.
        device_map: where every module lies, by its name here or in the release; None: layers are spread
            evenly. A name of the release's demos (``transformer.encoder.layers.0``) is understood.
        **options: of `load_model`.

    Returns:
        The model in evaluation mode, its weights read to their devices directly.

    Raises:
        ConfigError: there are not so many GPUs, they are too small, or the map does not fit the model; see
            `load_model`, also for CheckpointError.
    """
    if device_map is None or isinstance(device_map, str):
        options["num_gpus"] = num_gpus
    return load_model(source, device_map="auto" if device_map is None else device_map, **options)


def load_tuned(
    source: str | Path,
    *,
    prefix: PrefixEncoder | str | Path | None = None,
    prefix_strength: float = 1.0,
    adapter: str | Path | None = None,
    adapter_scale: float = 1.0,
    check_base: bool = True,
    use_switch: bool = True,
    **options: Any,
) -> GlmModel:
    """Load a base with its prefix or adapter, not yet prepared for inference.

    Args:
        source: see `load_model`.
        prefix: see `load_model`.
        prefix_strength: see `load_model`.
        adapter: see `load_model`.
        adapter_scale: see `load_model`.
        check_base: see `load_model`.
        use_switch: see `load_model`.
        **options: of `load_base`.

    Returns:
        The model in evaluation mode.

    Raises:
        ConfigError: see `load_model`; so are CheckpointError and ShapeError.
    """
    if prefix is not None and adapter is not None:
        raise ConfigError(
            "`prefix` and `adapter` are both given, but a model is tuned one way. Leave one out."
        )
    check_strengths(
        prefix=prefix,
        prefix_strength=prefix_strength,
        adapter=adapter,
        adapter_scale=adapter_scale,
        path="{}",
    )
    model = load_base(source, **options)
    model.use_switch = use_switch
    if adapter is not None:
        # Wraps layers of this very model.
        load_adapter(adapter, model, check_base=check_base, scale=adapter_scale)
    if prefix is not None:
        if not isinstance(prefix, PrefixEncoder):
            prefix = load_prefix(prefix, model, check_base=check_base)
        attach_prefix(model, prefix, strength=prefix_strength)
    return model


def load_base(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    family: Family | str | None = None,
    attn_implementation: str | None = None,
    quantization: str | None = None,
    quantization_embeddings: str | None = None,
    device_map: object = None,
    num_gpus: int | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
    verify_checksums: bool = True,
) -> GlmModel:
    """Load a base model, quantized or not: `load_official` with the means to quantize.

    Args:
        source: preset name, hub id or folder.
        dtype: floating type; codes and scales keep theirs.
        device: where the model will be.
        family: release line, None to detect it.
        attn_implementation: a name transformers knows.
        quantization: see `load_model`.
        quantization_embeddings: see `load_model`. Beside a ``quantization`` of ours they are rounded as they
            are read, so that they are never whole in floating point; else when all is there.
        device_map: see `load_model`.
        num_gpus: with ``device_map="auto"``: how many devices; None: all there are.
        max_memory: see `load_model`.
        verify_checksums: see `load_model`.

    Returns:
        The model in evaluation mode; a quantized one has `QuantizedLinear` layers.

    Raises:
        ConfigError: see `load_model`; so is CheckpointError.
    """
    if quantization_embeddings is not None:
        check_choice("quantization_embeddings", quantization_embeddings, EMBEDDINGS)
    placement = _placement(device, device_map, num_gpus, max_memory)
    if not isinstance(placement, Placement):
        placement, device = None, placement
    options: dict[str, Any] = {"dtype": dtype, "device": device, "family": family}
    options["attn_implementation"] = attn_implementation
    if quantization in EXTERNAL:
        if placement is not None:
            raise ConfigError(
                f"`quantization` is `{quantization}`, which is loaded to one device, and `device_map` splits "
                "the model. Use `quantization='int4'`, which splits, or one device."
            )
        with verifying(verify_checksums):
            model = load_external(source, quantization, **options)
    else:
        reader = QuantizingReader(quantization, embeddings=quantization_embeddings or False)
        with verifying(verify_checksums):
            model = load_official(source, quantizer=reader, placement=placement, **options)
    if quantization_embeddings is not None:
        round_embeddings(model)
    model.in_place_quantizer = InPlaceQuantization()
    return model


def _placement(
    device: Any, device_map: object, num_gpus: int | None, max_memory: Mapping[Any, int | str] | None
) -> Any:
    """Return where a model goes: a placement, or what `load_official` takes as its device."""
    if device_map is None:
        if max_memory is not None:
            raise ConfigError("`max_memory` is given without `device_map`. Add `device_map='auto'`.")
        return device
    if device is not None:
        raise ConfigError(
            f"`device` is `{device}` and `device_map` is `{str(device_map)[:60]}`, which say the same thing "
            "twice. Leave one of them out."
        )
    return parse_placement(device_map, num_gpus=num_gpus, max_memory=max_memory)
