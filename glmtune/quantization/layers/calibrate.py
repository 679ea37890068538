"""Quantize a model block by block by what its layers see: calibration rows, errors so far included."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glmtune.errors import ConfigError
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.quantization.arithmetic.gptq import output_signal_and_noise, quantize_gptq
from glmtune.quantization.arithmetic.methods import Method, method_named
from glmtune.quantization.layers.apply import replace_layer
from glmtune.quantization.layers.finished_layers import Part, PartStore
from glmtune.quantization.layers.plan import PlannedLayer, plan_layout, planned_layers
from glmtune.quantization.layers.report import LayerReport, QuantizationReport, layer_report


def quantize_calibrated(
    model: PreTrainedModel,
    method: str,
    rows: Sequence[Sequence[int]],
    *,
    skip: tuple[str, ...] = (),
    watch: Callable[[int, int], None] | None = None,
    parts: PartStore | None = None,
) -> QuantizationReport:
    """Quantize a loaded model in place with GPTQ, from the first block to the last.

    Every block is run on all rows for its inputs, behind blocks that are codes already, so that it can make
    good for their errors.

    Args:
        model: a base model in floating point, mutated.
        method: a calibrated name in ``METHODS``.
        rows: token ids, special tokens included, as the model sees them in use.
        skip: see `plan_layout`.
        watch: told how many blocks are done and how many there are.
        parts: keeps every layer, and gives those that an earlier run finished.

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
    if QuantizedLayout.of(config) is not None:
        raise ConfigError("The model is quantized already. Load its unquantized checkpoint to quantize anew.")
    layout = plan_layout(config, method, skip=skip)
    layout = dataclasses.replace(layout, source_fingerprint=cast(Any, model).fingerprint())
    layers = [layer for layer in planned_layers(config, layout) if not layer.entry.is_copy]
    blocks: Any = cast(Any, model.base_model).layers
    energies: dict[str, tuple[float, float]] = {}
    dtypes = {layer.name: model.get_parameter(layer.entry.native[0]).dtype for layer in layers}
    for number, block in enumerate(blocks):
        inside = [layer for layer in layers if not layer.reason and f".layers.{number}." in layer.name]
        earlier = {layer.name: parts.get(layer.name) for layer in inside} if parts is not None else {}
        if inside and all(earlier.get(layer.name) for layer in inside):
            made = {name: part for name, part in earlier.items() if part is not None}
            for layer in inside:
                _put(model, layer, layout, made[layer.name])
        else:  # a block is quantized as a whole, as all its layers see the same rows
            moments = _input_moments(model, block, inside, rows)
            made = {
                layer.name: _quantize(model, layer, layout, method_named(method), moments[layer.name])
                for layer in inside
            }
            if parts is not None:
                for name, part in made.items():
                    parts.put(name, part)
        energies |= {name: (part.signal, part.noise) for name, part in made.items()}
        if watch is not None:
            watch(number + 1, len(blocks))
    layout.put_into(config)
    reports = [
        layer_report(
            layer, method, method_named(method), dtypes[layer.name], *energies.get(layer.name, (0.0, 0.0))
        )
        for layer in layers
    ]
    return QuantizationReport(method, tuple[LayerReport, ...](reports), measured="outputs")


def _quantize(
    model: PreTrainedModel, layer: PlannedLayer, layout: QuantizedLayout, method: Method, moments_II: Tensor
) -> Part:
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
        more = output_signal_and_noise(weight, codes.dequantized().cpu(), moments_II)
        signal, noise = signal + more[0], noise + more[1]
    return Part(tensors, signal, noise, {})


def _put(model: PreTrainedModel, layer: PlannedLayer, layout: QuantizedLayout, part: Part) -> None:
    """Replace one official layer by what an earlier run made of it."""
    for name in layer.entry.native:
        codes = replace_layer(model, name.removesuffix(".weight"), layout)
        with torch.no_grad():
            for key, value in part.tensors.items():
                if key.startswith(f"{name}/"):
                    codes.get_parameter(key.removeprefix(f"{name}/")).copy_(value)


class _BlockIsDone(Exception):
    """Stops a forward pass behind the block that was to be watched."""


@torch.no_grad()
def _input_moments(
    model: PreTrainedModel, block: nn.Module, layers: Iterable[PlannedLayer], rows: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Return official name → sum of x xᵀ over the inputs of the layer, float32 ``[I, I]``."""
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
    for layer in layers:  # query, key and value have one input
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
