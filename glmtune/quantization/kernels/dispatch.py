"""Faster products of inputs with codes, one interface; the plain path in `linear` is what they must equal.

A kernel takes some layers (by device, floating type and shape) and some inputs (by number of rows). Whatever
it does not take runs on the plain path, so a kernel is never needed. `native` is compiled on the machine at
its first use (`glmtune.quantization.kernels.native`); where that cannot be, the products of PyTorch follow.

What they reach: ``benchmarks/results/quantized_inference.md``.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from glmtune.errors import ConfigError, unknown_name
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.quantization.arithmetic.primitives import QuantizedTensor, round_activations
from glmtune.quantization.kernels.fused_projections import join_attention_inputs
from glmtune.quantization.kernels.gated_mlp import fuse_gates
from glmtune.quantization.kernels.int4pack import Int4Packed, packed_int4, panel_outputs
from glmtune.quantization.kernels.native import native_library
from glmtune.quantization.kernels.packed import ACTIVATION_BLOCK, TYPES, PackedCodes, PackedProduct
from glmtune.quantization.kernels.small_batch import speed_up_few_rows
from glmtune.quantization.layers.linear import Product, QuantizedEmbedding, QuantizedLinear

LOGGER = logging.getLogger(__name__)

NATIVE_COLUMNS = 32
"""What group sizes must be a multiple of for the native products."""
INT4_GROUPS = (256, 128, 64, 32)
"""Group sizes of the packed INT4 product; the scale of a row is repeated for the largest one that fits."""
INT8_COLUMNS = 16
"""What the INT8 product reads at once."""
INT8_FEW_ROWS = 16
"""Up to so many rows the INT8 product reads codes; above, casting them once is faster."""
INT4_MOST_ROWS = 256
TRITON_MOST_ROWS = 256
"""Above, a GPU forms the weight once and multiplies as ever."""


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

    def prepared(self, layer: QuantizedLinear) -> Product:
        """Return the product for one layer."""
        ...


@dataclass(frozen=True, slots=True)
class NativeProduct:
    """INT8 and INT4 of any shape on CPUs with AVX-512; codes are held in the product's own order only.

    Attributes:
        name: what the log calls it.
        rounded: activations become INT8 (`round_activations`); otherwise products are exact.
    """

    name: str = "native"
    rounded: bool = False

    def refusal(self, layer: QuantizedLinear, dtype: torch.dtype) -> str:
        """See `Kernel`."""
        if layer.weight.device.type != "cpu":
            return f"the layer is on {layer.weight.device.type}"
        if dtype not in TYPES:
            return f"inputs are {_name(dtype)}"
        if layer.group_size is not None and layer.group_size % NATIVE_COLUMNS:
            return f"the group size {layer.group_size} is no multiple of {NATIVE_COLUMNS}"
        library = native_library()
        if library.refusal or library.rounds_activations or not self.rounded:
            return library.refusal
        return "the processor has no AVX-512 VNNI"

    def prepared(self, layer: QuantizedLinear) -> Product:
        """See `Kernel`."""
        codes = (layer.stored_codes(), layer.weight_scale, layer.weight_zero)
        packed = PackedCodes.of(*codes, bits=layer.bits, group_size=layer.group_size)
        return Product(PackedProduct(packed, self.rounded), tuple(TYPES), packed, packed.weight)


@dataclass(frozen=True, slots=True)
class RoundedPlain:
    """The plain path behind activations rounded to INT8: what their kernel must equal, for any layer."""

    name: str = "plain-a8"

    def refusal(self, layer: QuantizedLinear, dtype: torch.dtype) -> str:
        """See `Kernel`."""
        del layer, dtype
        return ""

    def prepared(self, layer: QuantizedLinear) -> Product:
        """See `Kernel`."""
        block = layer.group_size or ACTIVATION_BLOCK

        def product(x_RI: Tensor) -> Tensor:
            return nn.functional.linear(round_activations(x_RI, block=block), layer.dequantized(x_RI.dtype))

        return Product(product, (torch.float32, torch.bfloat16, torch.float16))


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

    def prepared(self, layer: QuantizedLinear) -> Product:
        """See `Kernel`."""
        codes_OI, scale_O = layer.stored_codes().detach(), layer.weight_scale.detach().bfloat16()

        def product(x_RI: Tensor) -> Tensor:
            if len(x_RI) <= INT8_FEW_ROWS:
                return torch.ops.aten._weight_int8pack_mm(x_RI.contiguous(), codes_OI, scale_O)
            return (x_RI @ codes_OI.to(x_RI.dtype).T).mul_(scale_O)  # codes up to 127 are exact in bfloat16

        return Product(product)


@dataclass(frozen=True, slots=True)
class Int4Product:
    """INT4 on CPUs, bfloat16 inputs; codes are held in PyTorch's order only, where that can be unpacked."""

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

    def prepared(self, layer: QuantizedLinear) -> Product:
        """See `Kernel`."""
        quantized, group = layer.quantized(), _group_of(layer)
        assert group is not None
        packed, panel = packed_int4(quantized.codes_OI), panel_outputs()
        grids_GO2 = _grids(quantized, layer.in_features // group)

        def product(x_RI: Tensor) -> Tensor | None:
            if len(x_RI) > INT4_MOST_ROWS:
                return None
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x_RI.contiguous(), packed, group, grids_GO2)

        return Product(product, stored=None if panel is None else Int4Packed(packed, panel))


@dataclass(frozen=True, slots=True)
class TritonKernel:
    """INT8 and INT4 on GPUs: codes are read as they are stored, gradients of the inputs included.

    Attributes:
        name: what the log calls it.
        device: kind of device; tests interpret the kernels on the CPU.
    """

    name: str = "triton"
    device: str = "cuda"

    def refusal(self, layer: QuantizedLinear, dtype: torch.dtype) -> str:
        """See `Kernel`; besides, the kernels are tried out once for every format."""
        if layer.weight.device.type != self.device:
            return f"the layer is on {layer.weight.device.type}"
        if layer.group_size not in (None, *INT4_GROUPS):
            return f"groups of {layer.group_size} columns are none of {INT4_GROUPS}"
        layout = QuantizedLayout(layer.bits, layer.group_size, layer.weight_zero is not None)
        return _triton_problem(layout, dtype, layer.weight.device)

    def prepared(self, layer: QuantizedLinear) -> Product:
        """See `Kernel`."""
        from glmtune.quantization.kernels.triton_kernels import TritonProduct

        product = TritonProduct(layer)

        def multiply(x_RI: Tensor) -> Tensor | None:
            return product(x_RI) if len(x_RI) <= TRITON_MOST_ROWS else None

        return Product(multiply, product.dtypes, input_gradient=product.input_gradient)


KERNELS: dict[str | None, tuple[Kernel, ...]] = {
    None: (NativeProduct(), Int8Product(), Int4Product(), TritonKernel()),
    "int8": (NativeProduct("native-a8", rounded=True), RoundedPlain()),
}
"""What activations become (None: nothing) → kernels in order of preference."""


def prepare_for_inference(
    model: nn.Module, dtype: torch.dtype | None = None, *, activations: str | None = None
) -> dict[str, int]:
    """Give every layer of codes the fastest product its device, type and shape allow.

    Where they are native, query, key and value are multiplied at once, and gates applied inside the product;
    unquantized layers in bfloat16 get a product of their own for few rows. A cast or a move of the model
    takes the products away again.

    Args:
        model: mutated.
        dtype: of the inputs; None: the model's own.
        activations: ``int8`` rounds the inputs of layers of codes, which is faster on long prompts and
            changes results; None leaves them.

    Returns:
        Name of the product (``plain`` for none) → number of layers.

    Raises:
        ConfigError: activations cannot become that, or the model has no layers of codes to round them for.
    """
    if activations not in KERNELS:
        names = [name for name in KERNELS if name is not None]
        raise ConfigError(unknown_name("`quantization_activations`", activations or "", names))
    kind = dtype if dtype is not None else getattr(model, "dtype", torch.float32)
    modules = [
        module for module in model.modules() if isinstance(module, QuantizedLinear | QuantizedEmbedding)
    ]
    layers = [module for module in modules if isinstance(module, QuantizedLinear)]
    if activations is not None and not layers:
        raise ConfigError(
            f"`quantization_activations` is `{activations}`, but the model is not quantized, and only the "
            "inputs of quantized layers are rounded. Add `quantization=int8` or `int4`, or leave it out."
        )
    owners = Counter(id(module.weight) for module in modules)
    used: Counter[str] = Counter()
    for layer in layers:
        layer.use(None)
        kernel = choose_kernel(layer, kind, activations)
        if kernel is not None:
            product = kernel.prepared(layer)
            shared = owners[id(layer.weight)] > 1  # an embedding looks its rows up in the same codes
            layer.use(dataclasses.replace(product, stored=None) if shared else product)
        used["plain" if kernel is None else kernel.name] += 1
    join_attention_inputs(model)
    fuse_gates(model)
    if kind == torch.bfloat16:
        speed_up_few_rows(model)
    return dict(used)


def choose_kernel(
    layer: QuantizedLinear, dtype: torch.dtype, activations: str | None = None
) -> Kernel | None:
    """Return the first kernel that takes a layer; what keeps all of them away is said once in the log.

    Args:
        layer: codes, on their device.
        dtype: of the inputs.
        activations: see `prepare_for_inference`.
    """
    reasons = []
    for kernel in KERNELS[activations]:
        refusal = kernel.refusal(layer, dtype)
        if not refusal:
            if reasons:
                _say_once(f"Layers of codes run on {kernel.name} ({'; '.join(reasons)}).")
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
        return f"inputs are {_name(dtype)}, not bfloat16"
    return "" if hasattr(torch.ops.aten, operation) else f"this PyTorch has no {operation}"


@functools.cache
def _triton_problem(layout: QuantizedLayout, dtype: torch.dtype, device: torch.device) -> str:
    """Try Triton's kernels on a small layer of a format; say why they cannot be used, "" if they can."""
    try:
        from glmtune.quantization.kernels.triton_kernels import TritonProduct
    except ImportError:
        return "Triton is not installed (pip install triton)"
    if dtype not in TritonProduct.dtypes:
        return f"inputs are {_name(dtype)}"
    layer = QuantizedLinear(96, 48, layout=layout).to(device)
    layer.weight.copy_(torch.arange(layer.weight.numel()).reshape(layer.weight.shape) * 37 % 251 - 125)
    layer.weight_scale.fill_(0.01)
    x_RI, weight_OI = torch.linspace(-1, 1, 2 * 96, device=device).reshape(2, 96), layer.dequantized()
    try:
        product = TritonProduct(layer)
        found, back = product(x_RI.to(dtype)).float(), product.input_gradient(x_RI[:, :48].to(dtype)).float()
    except Exception as error:  # a compiler at work: whatever it stumbles over, the plain path remains
        return f"Triton fails here ({type(error).__name__}: {str(error).strip().splitlines()[:1]})"
    expected, gradient = x_RI @ weight_OI.T, x_RI[:, :48] @ weight_OI
    limit = 0.03 * float(expected.abs().max()), 0.03 * float(gradient.abs().max())
    is_near = (found - expected).abs().max() <= limit[0] and (back - gradient).abs().max() <= limit[1]
    return "" if is_near else "Triton's results are wrong here"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _group_of(layer: QuantizedLinear) -> int | None:
    sizes = INT4_GROUPS if layer.group_size is None else (layer.group_size,)
    return next((size for size in sizes if size in INT4_GROUPS and layer.in_features % size == 0), None)


def _grids(quantized: QuantizedTensor, groups: int) -> Tensor:
    """Return scales and zero points as the packed product wants them: bfloat16 ``[G, O, 2]``."""
    shape = (quantized.scale.shape[0], groups)
    scale_OG = quantized.scale.reshape(shape[0], -1).expand(shape)
    zero_OG = torch.zeros(shape) if quantized.zero is None else quantized.zero.float()
    return torch.stack((scale_OG.float(), zero_OG), dim=-1).transpose(0, 1).bfloat16().contiguous()
