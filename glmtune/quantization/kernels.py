"""Faster products of inputs with codes, one interface; the plain path in `linear` is what they must equal.

A kernel takes some layers (by device, floating type and shape) and some inputs (by number of rows). Whatever
it does not take runs on the plain path, so a kernel is never needed.

Measured for a weight of 4096 x 4096 in bfloat16 on one thread (AVX-512 with AMX, torch 2.13), milliseconds at
1, 16, 64 and 512 rows: plain path 165 and more; `int4pack` 2.3, 8.7, 48, 330; `int8pack` 4.3, 16, 72, 527;
INT8 codes cast first 47, 35, 41, 120; an unquantized bfloat16 product 7.6, 6.3, 24, 124.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from glmtune.quantization.linear import QuantizedLinear
from glmtune.quantization.primitives import QuantizedTensor

LOGGER = logging.getLogger(__name__)

INT4_GROUPS = (256, 128, 64, 32)
"""Group sizes of the packed INT4 product; the scale of a row is repeated for the largest one that fits."""
INT8_COLUMNS = 16
"""What the INT8 product reads at once."""
INT8_FEW_ROWS = 16
"""Up to so many rows the INT8 product reads codes; above, casting them once is faster."""
INT4_MOST_ROWS = 256


class Kernel(Protocol):
    """Computes ``input @ weight.T`` for some layers and inputs."""

    @property
    def name(self) -> str:
        """What the log calls it."""
        ...

    def refusal(self, layer: QuantizedLinear, dtype: torch.dtype) -> str:
        """Say why a layer is not taken; "" if it is.

        Args:
            layer: codes, on their device.
            dtype: of the inputs to come.
        """
        ...

    def prepared(self, layer: QuantizedLinear) -> Callable[[Tensor], Tensor | None]:
        """Return the product for one layer: ``[R, I]`` bfloat16 to ``[R, O]``; None for inputs not taken."""
        ...


@dataclass(frozen=True, slots=True)
class Int8Product:
    """Row-scaled INT8 on CPUs, bfloat16 inputs: codes are read as they are stored, nothing is copied."""

    name: str = "int8pack"

    def refusal(self, layer: QuantizedLinear, dtype: torch.dtype) -> str:
        """See `Kernel`."""
        if layer.bits != 8 or layer.group_size is not None:
            return "codes are not INT8 with a scale per row"
        if layer.in_features % INT8_COLUMNS:  # torch 2.13 reads beyond the row's end and crashes the process
            return f"{layer.in_features} input features are no multiple of {INT8_COLUMNS}"
        return _cpu_refusal(layer, dtype, "_weight_int8pack_mm")

    def prepared(self, layer: QuantizedLinear) -> Callable[[Tensor], Tensor | None]:
        """See `Kernel`."""
        codes_OI, scale_O = layer.weight.detach(), layer.weight_scale.detach().bfloat16()

        def product(x_RI: Tensor) -> Tensor:
            if len(x_RI) <= INT8_FEW_ROWS:
                return torch.ops.aten._weight_int8pack_mm(x_RI.contiguous(), codes_OI, scale_O)
            return (x_RI @ codes_OI.to(x_RI.dtype).T).mul_(scale_O)  # codes up to 127 are exact in bfloat16

        return product


@dataclass(frozen=True, slots=True)
class Int4Product:
    """INT4 on CPUs, bfloat16 inputs; codes are repacked, so a layer holds them twice."""

    name: str = "int4pack"

    def refusal(self, layer: QuantizedLinear, dtype: torch.dtype) -> str:
        """See `Kernel`."""
        if layer.bits != 4:
            return "codes are not INT4"
        if layer.out_features % 16:
            return f"{layer.out_features} output features are no multiple of 16"
        if _group_of(layer) is None:
            return f"no group size of {INT4_GROUPS} fits {layer.in_features} input features"
        return _cpu_refusal(layer, dtype, "_weight_int4pack_mm_for_cpu")

    def prepared(self, layer: QuantizedLinear) -> Callable[[Tensor], Tensor | None]:
        """See `Kernel`."""
        quantized, group = layer.quantized(), _group_of(layer)
        assert group is not None
        unsigned = quantized.codes_OI.to(torch.int32) + 8
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        grids_GO2 = _grids(quantized, layer.in_features // group)

        def product(x_RI: Tensor) -> Tensor | None:
            if len(x_RI) > INT4_MOST_ROWS:
                return None
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x_RI.contiguous(), packed, group, grids_GO2)

        return product


KERNELS: tuple[Kernel, ...] = (Int8Product(), Int4Product())
"""In order of preference."""


def prepare_for_inference(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Give every layer of codes the fastest product its device, type and shape allow.

    Results change by the rounding of scales to bfloat16. INT4 layers hold their codes twice then. A cast
    or a move of the model takes the products away again.

    Args:
        model: mutated.
        dtype: of the inputs; None: the model's own.

    Returns:
        Name of the product (``plain`` for none) → number of layers.
    """
    kind = dtype if dtype is not None else getattr(model, "dtype", torch.float32)
    used: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            kernel = choose_kernel(module, kind)
            module.product = None if kernel is None else kernel.prepared(module)
            name = "plain" if kernel is None else kernel.name
            used[name] = used.get(name, 0) + 1
    return used


def choose_kernel(layer: QuantizedLinear, dtype: torch.dtype) -> Kernel | None:
    """Return the first kernel that takes a layer; what keeps all of them away is said once in the log.

    Args:
        layer: codes, on their device.
        dtype: of the inputs.
    """
    reasons = []
    for kernel in KERNELS:
        refusal = kernel.refusal(layer, dtype)
        if not refusal:
            return kernel
        reasons.append(f"{kernel.name}: {refusal}")
    _say_once(f"Layers of codes run on the plain path ({'; '.join(reasons)}).")
    return None


@functools.cache
def _say_once(message: str) -> None:
    LOGGER.info(message)


def _cpu_refusal(layer: QuantizedLinear, dtype: torch.dtype, operation: str) -> str:
    if layer.weight.device.type != "cpu":
        return f"the layer is on {layer.weight.device.type}"
    if dtype != torch.bfloat16:
        return f"inputs are {str(dtype).removeprefix('torch.')}, not bfloat16"
    return "" if hasattr(torch.ops.aten, operation) else f"this PyTorch has no {operation}"


def _group_of(layer: QuantizedLinear) -> int | None:
    sizes = INT4_GROUPS if layer.group_size is None else (layer.group_size,)
    return next((size for size in sizes if size in INT4_GROUPS and layer.in_features % size == 0), None)


def _grids(quantized: QuantizedTensor, groups: int) -> Tensor:
    """Return scales and zero points as the packed product wants them: bfloat16 ``[G, O, 2]``."""
    shape = (quantized.scale.shape[0], groups)
    scale_OG = quantized.scale.reshape(shape[0], -1).expand(shape)
    zero_OG = torch.zeros(shape) if quantized.zero is None else quantized.zero.float()
    return torch.stack((scale_OG.float(), zero_OG), dim=-1).transpose(0, 1).bfloat16().contiguous()
