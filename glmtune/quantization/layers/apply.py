"""Put layers of codes in the place of a model's floating point ones.

`quantize_model` quantizes a model that is loaded; `replace_layers` only makes room for codes, which a reader
then fills (`glmtune.quantization.files.quantize_on_load`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glmtune.errors import ConfigError
from glmtune.models.checkpoints.fingerprint import outer_entries, sampled_signs, stored_signs
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout, packed_signs
from glmtune.quantization.arithmetic.chunking import quantize_in_chunks
from glmtune.quantization.arithmetic.methods import method_named
from glmtune.quantization.layers.linear import QuantizedEmbedding, QuantizedLinear
from glmtune.quantization.layers.plan import PlannedLayer, plan_layout, planned_layers
from glmtune.quantization.layers.report import LayerReport, QuantizationReport, layer_report


def quantize_model(
    model: PreTrainedModel,
    method: str,
    *,
    skip: tuple[str, ...] = (),
    embeddings: bool | str = False,
    stored_dtype: torch.dtype | None = None,
) -> QuantizationReport:
    """Quantize a loaded model in place, one layer after the other.

    Loading quantized (`glmtune.load_model(source, quantization=...)`) needs less memory.

    Args:
        model: a base model in floating point, mutated.
        method: a name in `glmtune.quantization.arithmetic.methods.METHODS`.
        skip: see `plan_layout`.
        embeddings: see `plan_layout`.
        stored_dtype: type of the checkpoint that the weights come from. Where they were only cast since, they
            are quantized in it, so that codes are those of quantizing on loading; None: in their own type.

    Returns:
        What was done to every layer, with the SQNR of its weight.

    Raises:
        ConfigError: see `plan_layout`; the model is quantized already.
        CheckpointError: a weight is not finite.
    """
    config: Any = model.config
    layout = layout_for(model, method, skip=skip, embeddings=embeddings)
    # A copy (the head that ChatGLM-6B ties to its embedding) is handled with its original.
    layers = [layer for layer in planned_layers(config, layout) if not layer.entry.is_copy]
    reports = tuple(quantize_layer(model, layer, layout, stored_dtype) for layer in layers)
    tie_head(model, layout)
    layout.put_into(config)
    note_outer_signs(model)
    return QuantizationReport(method, reports)


def layout_for(
    model: PreTrainedModel, method: str, *, skip: tuple[str, ...] = (), embeddings: bool | str = False
) -> QuantizedLayout:
    """Plan the layout of a loaded model, which remembers the weights it has now.

    Args:
        model: a base model in floating point.
        method: see `plan_layout`.
        skip: see `plan_layout`.
        embeddings: see `plan_layout`.

    Raises:
        ConfigError: see `plan_layout`; the model is quantized already.
    """
    config: Any = model.config
    if QuantizedLayout.of(config) is not None:
        raise ConfigError("The model is quantized already. Load its unquantized checkpoint to quantize anew.")
    layout = plan_layout(config, method, skip=skip, embeddings=embeddings)
    # Prefixes and adapters name their base by this fingerprint; of codes it could not be computed any more.
    layout = dataclasses.replace(layout, source_fingerprint=cast(Any, model).fingerprint())
    return with_outer_signs(layout, config, lambda name: sampled_signs(model.get_parameter(name)))


def with_outer_signs(
    layout: QuantizedLayout, config: Any, signs_of: Callable[[str], bytes]
) -> QuantizedLayout:
    """Return a layout that tells the signs of embedding and head, where these are to be INT8.

    Args:
        layout: of the model.
        config: as made by `native_config`.
        signs_of: native name of their weights → what `sampled_signs` says of it.
    """
    if not layout.has_int8_embeddings:
        return layout
    signs = {place: packed_signs(signs_of(entry.native[0])) for place, entry in outer_entries(config).items()}
    return dataclasses.replace(layout, outer_signs=signs)


def note_outer_signs(model: PreTrainedModel) -> None:
    """Let embedding and head in INT8 know the signs of their weights, as those that are rounded in memory.

    Args:
        model: its configuration has the layout; mutated.
    """
    known = stored_signs(model.config)
    if not known:
        return
    parts: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    first, *others = known.values()  # a tied head has none of its own
    parts[0].source_signs, parts[1].source_signs = first, (others or [first])[0]


def replace_layers(model: PreTrainedModel, layout: QuantizedLayout) -> None:
    """Put empty layers of codes in place of a model's, to be filled from a checkpoint.

    Args:
        model: mutated; best on the meta device, where the layers replaced take no memory.
        layout: says which layers.
    """
    for layer in planned_layers(model.config, layout):
        if not layer.reason:
            for weight in layer.entry.native:
                replace_layer(model, weight.removesuffix(".weight"), layout.of_layer(layer.name))
    tie_head(model, layout)


def quantize_layer(
    model: PreTrainedModel,
    layer: PlannedLayer,
    layout: QuantizedLayout,
    stored_dtype: torch.dtype | None = None,
) -> LayerReport:
    """Replace one official layer, which may be three of the model's; one that is to stay is reported only.

    Args:
        model: a base model, mutated.
        layer: from the plan.
        layout: of the model.
        stored_dtype: see `quantize_model`.

    Raises:
        CheckpointError: the weight is not finite.
    """
    signal = noise = 0.0
    layout = layout.of_layer(layer.name)
    method = method_named(layout.method)
    dtype = model.get_parameter(layer.entry.native[0]).dtype
    for name in layer.entry.native if not layer.reason else ():
        weight = model.get_parameter(name).detach()

        # The default binds the weight of this turn of the loop. Codes are chosen on the CPU, a chunk at a
        # time, so that they are the same wherever the model lies.
        def read(start: int, stop: int, weight: Tensor = weight) -> Tensor:
            return as_stored(weight[start:stop].cpu(), stored_dtype)

        found = quantize_in_chunks(method, tuple(weight.shape), read, name=layer.name, measure=True)
        codes = replace_layer(model, name.removesuffix(".weight"), layout)
        with torch.no_grad():
            for part, made in found.tensors.items():
                getattr(codes, part).copy_(made)
        signal, noise = signal + found.signal, noise + found.noise
    return layer_report(layer, layout.method, method, dtype, signal, noise)


def as_stored(rows: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return rows in the type of their checkpoint, if that changes no number.

    Args:
        rows: float, any shape.
        dtype: of the checkpoint; None: not known.
    """
    stored = rows if dtype is None else rows.to(dtype)
    return stored if torch.equal(stored.to(rows.dtype), rows) else rows


def replace_layer(
    model: PreTrainedModel, name: str, layout: QuantizedLayout
) -> QuantizedLinear | QuantizedEmbedding:
    """Put one empty layer of codes in place.

    Args:
        model: mutated.
        name: the layer's name in the model.
        layout: bits, groups and zero points.
    """
    old: Any = model.get_submodule(name)
    with torch.device(old.weight.device):
        if isinstance(old, nn.Embedding):
            new = QuantizedEmbedding(*old.weight.shape, layout=layout, dtype=old.weight.dtype)
        else:
            new = QuantizedLinear(old.in_features, old.out_features, layout=layout, bias=old.bias)
    new.train(old.training)
    model.set_submodule(name, new)
    return new


def tie_head(model: PreTrainedModel, layout: QuantizedLayout) -> None:
    """Let the head hold the embedding's codes where the two are one matrix, as in the first generation.

    transformers ties parameters by name when it loads or builds a model (``_tied_weights_keys``, target →
    source, 5.24); codes need an entry for each of their parameters, so the instance gets its own list.

    Args:
        model: its embedding is codes already if the layout says so; mutated.
        layout: of the model.
    """
    config: Any = model.config
    if not (layout.embeddings and config.tie_word_embeddings):
        return
    name = next(name for name, module in model.named_modules() if isinstance(module, QuantizedEmbedding))
    head = "lm_head"
    layout = layout.of_layer(head)
    if not isinstance(model.get_submodule(head), QuantizedLinear):
        replace_layer(model, head, layout)
    tied = {f"{head}.{part}": f"{name}.{part}" for part in layout.shapes((2, 2))}
    model._tied_weights_keys = tied
    model.tie_weights()
