"""Weights that are read, merged or renamed only when they are asked for, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from glmtune.models.checkpoints.config import NativeConfig
from glmtune.models.checkpoints.headers import TensorRecord
from glmtune.models.checkpoints.names import FusedLayout, name_table, split_fused
from glmtune.models.checkpoints.quantized_layout import SCALE, ZERO, QuantizedLayout
from glmtune.models.checkpoints.reading import check_records
from glmtune.models.checkpoints.shard_writer import LazyTensors
from glmtune.models.checkpoints.shards import OpenShards, read_records
from glmtune.quantization.arithmetic.packing import unpack
from glmtune.quantization.arithmetic.primitives import QuantizedTensor, dequantize

if TYPE_CHECKING:
    from peft import PeftModel


def stored_tensors(folder: Path, shards: OpenShards, *, tied: bool = False) -> LazyTensors:
    """Offer the tensors of a checkpoint folder under the names its files use.

    Args:
        folder: the folder.
        shards: its files are opened there, and stay open until these are closed.
        tied: in transformers' format: the head is the embedding, and is offered under its own name, too.
    """
    records = dict(read_records(folder))
    if tied:
        records["lm_head.weight"] = records["model.embed_tokens.weight"]
    return LazyTensors(
        {name: partial(shards.read, record) for name, record in records.items()},
        {name: record.shape for name, record in records.items()},
    )


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the floating type that holds every weight of a checkpoint folder without loss.

    That of the files, not of config.json, which may say another; float16 beside bfloat16 gives float32.
    """
    types = {record.dtype for record in read_records(folder).values() if record.dtype.is_floating_point}
    return reduce(torch.promote_types, types)


def native_tensors(folder: Path, config: NativeConfig, shards: OpenShards) -> LazyTensors:
    """Offer the tensors of an official checkpoint under native names.

    Args:
        folder: the checkpoint's folder.
        config: as made by `native_config`.
        shards: its files are opened there, and stay open until these are closed.

    Raises:
        CheckpointError: missing, leftover or misshapen tensors, all of them named.
    """
    records = read_records(folder)
    check_records(records, config, folder)
    layout = FusedLayout.of(config)
    makers: dict[str, Callable[[], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    embedding = name_table(config)[0].official.removesuffix("weight")
    for entry in name_table(config):
        # A tied head may not be stored; its codes and scales are those of the embedding.
        part = entry.official.rpartition(".")[2]
        record = records[entry.official if entry.official in records else f"{embedding}{part}"]
        if len(entry.native) == 1:
            makers[entry.native[0]], shapes[entry.native[0]] = partial(shards.read, record), entry.shape
            continue
        # Each of the three reads the fused tensor anew: to keep it until all have been asked for would hold
        # memory for as long as nobody knows.
        for part, (name, rows) in enumerate(zip(entry.native, layout.rows, strict=True)):
            makers[name] = partial(_fused_part, shards, record, layout, part)
            shapes[name] = (rows, *entry.shape[1:])
    return LazyTensors(makers, shapes)


def dequantized_tensors(weights: LazyTensors, config: NativeConfig) -> LazyTensors:
    """Offer the weights behind the codes of a quantized checkpoint.

    Args:
        weights: native name → codes, scales and all other tensors.
        config: of the quantized checkpoint.

    Returns:
        The names of an unquantized model; what was codes is float32, the rest as it was.
    """
    layout = QuantizedLayout.of(config)
    assert layout is not None
    makers: dict[str, Callable[[], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    codes = {
        name: layout.of_layer(entry.official.removesuffix(".weight"))
        for entry in name_table(config)
        if entry.is_codes
        for name in entry.native
    }
    for name, shape in weights.shapes.items():
        if name in codes:
            makers[name] = partial(_dequantized, weights, name, codes[name])
            shapes[name] = (shape[0], shape[1] * 8 // codes[name].bits)
        elif not name.endswith((SCALE, ZERO)):
            makers[name], shapes[name] = partial(weights.__getitem__, name), shape
    return LazyTensors(makers, shapes)


def merge_adapter(weights: LazyTensors, adapted: PeftModel) -> LazyTensors:
    """Add a LoRA adapter to the weights it was trained for: W + s·B·A (arXiv:2106.09685), in float32.

    Not by PEFT's own ``merge_and_unload``, which needs the whole model in memory and rounds in its type.

    Args:
        weights: native name → tensor of the base.
        adapted: model with the adapter; its own base weights are not looked at.

    Returns:
        The same names; adapted weights are float32, the others as they were.
    """
    makers: dict[str, Callable[[], Tensor]] = {name: partial(weights.__getitem__, name) for name in weights}
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            makers[f"{name}.weight"] = partial(_merged, weights, f"{name}.weight", module)
    return LazyTensors(makers, weights.shapes)


def without_head(weights: LazyTensors) -> LazyTensors:
    """Leave a tied head out, as transformers does when it writes a checkpoint."""
    kept = {name: shape for name, shape in weights.shapes.items() if name != "lm_head.weight"}
    return LazyTensors({name: partial(weights.__getitem__, name) for name in kept}, kept)


def is_adapted(model: Any, name: str) -> bool:
    """Tell whether a LoRA adapter is on a layer.

    Args:
        model: with an adapter.
        name: of the layer in the base.
    """
    return isinstance(model.get_base_model().get_submodule(name), LoraLayer)


def _fused_part(shards: OpenShards, record: TensorRecord, layout: FusedLayout, part: int) -> Tensor:
    return split_fused(shards.read(record), layout)[part].clone()  # a view would hold all three


def _dequantized(weights: LazyTensors, name: str, layout: QuantizedLayout) -> Tensor:
    module = name.removesuffix("weight")
    return dequantize(
        QuantizedTensor(
            unpack(weights[name], bits=layout.bits),
            weights[f"{module}{SCALE}"],
            weights[f"{module}{ZERO}"] if layout.has_zero else None,
            layout.group_size,
        )
    )


def _merged(weights: LazyTensors, name: str, module: Any) -> Tensor:
    with torch.no_grad():
        delta = module.get_delta_weight(module.active_adapters[0])
        return delta.add_(weights[name])
