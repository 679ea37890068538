"""Quantize a model by GPTQ, block by block, from the inputs that its layers see on calibration rows.

::

    rows -> block 0 -> block 1 -> block 2 -> ...
            codes      codes      its inputs are those behind codes

Blocks are done in order and each is run behind those already quantized: it then sees the inputs that
it will see in use, errors of earlier blocks included, and its rounding can make good for some of them
(as the GPTQ code does). The moments of the inputs are all that GPTQ needs of them: one ``[I, I]``
matrix per layer instead of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glmtune.errors import ConfigError
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.quantization.arithmetic.gptq import output_signal_and_noise, quantize_gptq
from glmtune.quantization.arithmetic.methods import QuantizationMethod, method_named
from glmtune.quantization.layers.apply import (
    layout_for,
    note_outer_signs,
    quantize_layer,
    replace_layer,
    tie_head,
)
from glmtune.quantization.layers.finished_layers import FinishedLayer, FinishedLayers
from glmtune.quantization.layers.plan import PlannedLayer, planned_layers
from glmtune.quantization.layers.report import QuantizationReport, layer_report


def quantize_calibrated(
    model: PreTrainedModel,
    method: str,
    rows: Sequence[Sequence[int]],
    *,
    skip: tuple[str, ...] = (),
    embeddings: bool | str = False,
    on_progress: Callable[[int, int], None] | None = None,
    finished: FinishedLayers | None = None,
) -> QuantizationReport:
    """Quantize a loaded model in place with GPTQ, from the first block to the last.

    Args:
        model: a base model in floating point, mutated.
        method: a calibrated name in ``METHODS``.
        rows: token ids, special tokens included, as the model sees them in use.
        skip: see `plan_layout`.
        embeddings: see `plan_layout`; rounded without looking at rows, before the first block is done.
        on_progress: called with the number of blocks done and of all blocks.
        finished: keeps every layer, and gives those that an earlier run finished.

    Returns:
        What was done to every layer; signal and noise are those of its outputs on these rows.

    Raises:
        ConfigError: no rows; see `plan_layout`; the model is quantized already.
    """
    if not rows:
        raise ConfigError(
            f"`quantization` is `{method}`, which needs rows to calibrate with, but there are none."
        )
    config: Any = model.config
    layout = layout_for(model, method, skip=skip, embeddings=embeddings)
    layers = [layer for layer in planned_layers(config, layout) if not layer.entry.is_copy]
    # Taken now, as afterwards the layers hold codes.
    dtypes = {layer.name: model.get_parameter(layer.entry.native[0]).dtype for layer in layers}
    chosen, energies = method_named(method), dict[str, tuple[float, float]]()
    # First, as blocks are to see the inputs that they will see in use.
    outer = {
        layer.name: quantize_layer(model, layer, layout)
        for layer in layers
        if not layer.reason and ".layers." not in layer.name
    }
    tie_head(model, layout)
    blocks: Any = cast(Any, model.base_model).layers
    for number, block in enumerate(blocks):
        inside = [layer for layer in layers if not layer.reason and f".layers.{number}." in layer.name]
        made = _earlier(inside, finished)
        if made is not None:
            for layer in inside:
                _put(model, layer, layout, made[layer.name])
        else:
            moments = _input_moments(model, block, inside, rows)
            made = {
                layer.name: _quantize(model, layer, layout, chosen, moments[layer.name]) for layer in inside
            }
            if finished is not None:
                for name, layer in made.items():
                    finished.put(name, layer)
        energies |= {name: (layer.signal, layer.noise) for name, layer in made.items()}
        if on_progress is not None:
            on_progress(number + 1, len(blocks))
    layout.put_into(config)
    note_outer_signs(model)
    reports = tuple(
        outer.get(layer.name)
        or layer_report(layer, method, chosen, dtypes[layer.name], *energies.get(layer.name, (0.0, 0.0)))
        for layer in layers
    )
    return QuantizationReport(method, reports, measured="outputs")


def _earlier(
    layers: Sequence[PlannedLayer], finished: FinishedLayers | None
) -> dict[str, FinishedLayer] | None:
    """Return a block's layers as an earlier run made them; None unless all of them are there.

    A block is resumed as a whole: its moments are collected before any of its layers is replaced, so a block
    with some layers of codes would give the others other inputs than a run without a kill does.
    """
    if finished is None:
        return None
    found = {layer.name: finished.get(layer.name) for layer in layers}
    made = {name: layer for name, layer in found.items() if layer is not None}
    return made if made and len(made) == len(layers) else None


def _quantize(
    model: PreTrainedModel,
    layer: PlannedLayer,
    layout: QuantizedLayout,
    method: QuantizationMethod,
    moments_II: Tensor,
) -> FinishedLayer:
    """Replace one official layer, three of the model's perhaps; return codes and energies of its outputs."""
    signal = noise = 0.0
    tensors: dict[str, Tensor] = {}
    for name in layer.entry.native:
        weight = model.get_parameter(name).detach().cpu()
        quantized = quantize_gptq(
            weight,
            moments_II,
            bits=method.bits,
            group_size=method.group_size,
            symmetric=method.symmetric,
        )
        codes = replace_layer(model, name.removesuffix(".weight"), layout)
        codes.put(quantized)
        tensors |= {f"{name}/{key}": value for key, value in codes.state_dict().items() if key != "bias"}
        # By the outputs, not the weights: GPTQ moves weights away from their nearest codes on purpose.
        more = output_signal_and_noise(weight, codes.dequantized().cpu(), moments_II)
        signal, noise = signal + more[0], noise + more[1]
    return FinishedLayer(tensors, signal, noise, {})


def _put(model: PreTrainedModel, layer: PlannedLayer, layout: QuantizedLayout, made: FinishedLayer) -> None:
    """Replace one official layer by what an earlier run made of it."""
    for name in layer.entry.native:
        codes = replace_layer(model, name.removesuffix(".weight"), layout)
        with torch.no_grad():
            for key, value in made.tensors.items():
                if key.startswith(f"{name}/"):
                    codes.get_parameter(key.removeprefix(f"{name}/")).copy_(value)


class _BlockIsDone(Exception):
    """Ends a forward pass behind the block whose inputs were wanted; the blocks after it need not run."""


@torch.no_grad()
def _input_moments(
    model: PreTrainedModel, block: nn.Module, layers: Iterable[PlannedLayer], rows: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Return official name → sum of x xᵀ over the inputs of the layer, float32 ``[I, I]``.

    Every row is sent through the model from its start, up to this block. Keeping each row's hidden states
    between blocks would be faster, but masks and rotary positions would have to be kept with them,
    differently in every generation.
    """
    moments: dict[str, Tensor] = {}

    def summing(name: str) -> Callable[..., None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_RI = inputs[0].reshape(-1, inputs[0].shape[-1]).float().cpu()
            found = x_RI.T @ x_RI
            moments[name] = moments[name] + found if name in moments else found

        return add

    def stop(*_: object) -> None:
        raise _BlockIsDone

    hooks = [block.register_forward_hook(stop)]
    for layer in layers:  # query, key and value have one input: the first stands for all three
        module = model.get_submodule(layer.entry.native[0].removesuffix(".weight"))
        hooks.append(module.register_forward_pre_hook(summing(layer.name)))
    try:
        for row in rows:
            try:
                model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False)
            except _BlockIsDone:
                continue
    finally:
        for hook in hooks:
            hook.remove()
    return moments
