"""Which product multiplies inputs by codes: the fastest that the device, the type and the shape allow.

A kernel takes some layers and, of those, some inputs by their number of rows. Whatever it does not take runs
on the plain path of `glmtune.quantization.layers.linear`, so no kernel is ever needed::

    where                                  rows     product
    CPU with AVX-512 or AVX2, C++ compiler any      native: codes in panels, compiled on the machine
      float32, or bfloat16 with AMX        >= 64      PyTorch's product, the weight formed in parts
      activations=int8 (AVX2, or VNNI)     any      native-a8: the same with inputs rounded to INT8
    other CPUs, bfloat16 inputs, int8      <= 16    int8pack: PyTorch's product with codes
                                           > 16       codes cast to bfloat16, PyTorch's product
    other CPUs, bfloat16 inputs, int4      <= 256   int4pack: PyTorch's product with codes
                                           > 256      plain path
    other CPUs, activations=int8           any      plain-a8: rounded inputs, plain path
    GPU with Triton, one scale per row     <= 256   triton
      or groups of 32 to 256               > 256      plain path
    anything else                          any      plain path

Few rows (decoding) are bound by reading the weight, so codes should be read as they are; many rows (a prompt)
by arithmetic, so forming the weight once pays.

PyTorch's products (int8pack, int4pack) stay although the native ones are faster: many machines have no
compiler (Windows, a Mac) or are no x86-64. Milliseconds of plain path / PyTorch's product, 2,048 x 2,048, one
thread without bfloat16 instructions, torch 2.13 (``benchmarks/layer_products.py``)::

    rows              1            4            16          64         256
    int8            4.0 / 0.30   5.8 / 0.61   9.4 / 2.2   24 / 20    76 / 71
    int4            8.4 / 0.31    10 / 0.57    13 / 2.0   28 / 7.6   81 / 29
    int4-g32-asym    13 / 0.32    16 / 0.58    21 / 2.3   34 / 8.4   88 / 31

so decoding is 13 to 40 times as fast. Whole models: ``benchmarks/results/quantized_inference.md``.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from glmtune.errors import ConfigError, unknown_name
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.quantization.arithmetic.primitives import QuantizedTensor, round_activations
from glmtune.quantization.kernels.between_products import use_calls_between_products
from glmtune.quantization.kernels.decoding_layers import use_decoding_layers
from glmtune.quantization.kernels.fused_projections import fuse_attention_projections
from glmtune.quantization.kernels.gated_mlp import fuse_gates
from glmtune.quantization.kernels.int4pack import Int4Packed, packed_int4, panel_outputs
from glmtune.quantization.kernels.native import native_library
from glmtune.quantization.kernels.packed import ACTIVATION_BLOCK, DTYPE_NUMBERS, PackedCodes, PackedProduct
from glmtune.quantization.kernels.small_batch import use_small_batch_products
from glmtune.quantization.layers.embeddings import round_embeddings
from glmtune.quantization.layers.linear import Product, QuantizedEmbedding, QuantizedLinear

LOGGER = logging.getLogger(__name__)

NATIVE_COLUMNS = 32
"""What group sizes must be a multiple of for the native products, whose loops step through a group by 4 or 8
columns of codes and by 16 of activations; no method here has smaller groups."""
INT4_GROUPS = (256, 128, 64, 32)
"""Group sizes of the packed INT4 product; the scale of a row is repeated for the largest one that fits."""
INT8_COLUMNS = 16
"""What PyTorch's INT8 product reads at once."""
INT8_MAX_ROWS = 16
"""Up to so many rows PyTorch's INT8 product is called; above, casting the codes once and a product of
matrices is faster where the processor has bfloat16 instructions. Where it has none, codes would win for
longer (128 rows: 27 against 70 ms), but such machines mostly run the native product."""
INT4_MAX_ROWS = 256
"""The same for PyTorch's INT4 product: 2.8 times as fast as the plain path at 256 rows, no faster at 512."""
TRITON_MAX_ROWS = 256
"""Above, a GPU forms the weight once and multiplies by that, as arithmetic outweighs reading by then. An
estimate: no GPU has run these kernels yet."""


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
    """INT8 and INT4 of any shape on CPUs with AVX-512 or AVX2; codes, scales and zero points are in panels.

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
        if dtype not in DTYPE_NUMBERS:
            return f"inputs are {_name(dtype)}"
        if layer.group_size is not None and layer.group_size % NATIVE_COLUMNS:
            return f"the group size {layer.group_size} is no multiple of {NATIVE_COLUMNS}"
        library = native_library()
        if library.refusal or library.rounds_activations or not self.rounded:
            return library.refusal
        return "the processor has AVX-512 without VNNI"

    def prepared(self, layer: QuantizedLinear) -> Product:
        """See `Kernel`."""
        codes = (layer.stored_codes(), layer.weight_scale, layer.weight_zero)
        packed = PackedCodes.of(*codes, bits=layer.bits, group_size=layer.group_size)
        return Product(PackedProduct(packed, self.rounded), tuple(DTYPE_NUMBERS), packed, packed.weight)


@dataclass(frozen=True, slots=True)
class RoundedPlain:
    """The plain path behind activations rounded to INT8.

    Without it `quantization_activations=int8` would be ignored where the native product cannot run, and the
    same evaluation would give other answers there. It is also what the native product is tested against.
    """

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
        # torch 2.13 reads beyond the end of the row: a segmentation fault.
        if layer.in_features % INT8_COLUMNS:
            return f"{layer.in_features} input features are no multiple of {INT8_COLUMNS}"
        return _cpu_refusal(layer, dtype, "_weight_int8pack_mm")

    def prepared(self, layer: QuantizedLinear) -> Product:
        """See `Kernel`."""
        codes_OI, scale_O = layer.stored_codes().detach(), layer.weight_scale.detach().bfloat16()

        def product(x_RI: Tensor) -> Tensor:
            if len(x_RI) <= INT8_MAX_ROWS:
                return torch.ops.aten._weight_int8pack_mm(x_RI.contiguous(), codes_OI, scale_O)
            # Exact: bfloat16 has 8 bits of mantissa, enough for every code from -128 to 127.
            return (x_RI @ codes_OI.to(x_RI.dtype).T).mul_(scale_O)

        return Product(product)


@dataclass(frozen=True, slots=True)
class Int4Product:
    """INT4 on CPUs, bfloat16 inputs; codes are held in PyTorch's order, where that can be unpacked."""

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
            if len(x_RI) > INT4_MAX_ROWS:
                return None  # the plain path
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x_RI.contiguous(), packed, group, grids_GO2)

        return Product(product, storage=None if panel is None else Int4Packed(packed, panel))


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
            return product(x_RI) if len(x_RI) <= TRITON_MAX_ROWS else None

        return Product(multiply, product.dtypes, input_gradient=product.input_gradient)


KERNELS: dict[str | None, tuple[Kernel, ...]] = {
    None: (NativeProduct(), Int8Product(), Int4Product(), TritonKernel()),
    "int8": (NativeProduct("native-a8", rounded=True), RoundedPlain()),
}
"""What activations become (None: nothing) → kernels in order of preference."""


def prepare_for_inference(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    *,
    activations: str | None = None,
    embeddings: str | None = None,
) -> dict[str, int]:
    """Give every layer of codes the fastest product its device, type and shape allow.

    Where products are native, query, key and value become one product, MLPs apply their gate inside it, norms
    and rotary embeddings are one call each, and layers call all of them directly for a few tokens;
    unquantized layers in bfloat16 get a product of their own for few rows. A cast or a move of the model
    takes the products away again.

    Args:
        model: mutated.
        dtype: of the inputs; None: that of the model. A single layer of codes has none of its own.
        activations: ``int8`` rounds the inputs of layers of codes, which is faster on long prompts and
            changes results; None leaves them.
        embeddings: ``int8`` rounds embedding and head, where they are floating point, to codes first
            (`round_embeddings`); the inputs of that head are never rounded. None leaves them.

    Returns:
        Name of the product (``plain`` for none) → number of layers.

    Raises:
        ConfigError: activations cannot become that, or the model has no layers of codes to round them for;
            see `round_embeddings`.
    """
    if activations not in KERNELS:
        names = [name for name in KERNELS if name is not None]
        raise ConfigError(unknown_name("`quantization_activations`", activations or "", names))
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if activations is not None and not layers:
        raise ConfigError(
            f"`quantization_activations` is `{activations}`, but the model is not quantized, and only the "
            "inputs of quantized layers are rounded. Add `quantization=int8` or `int4`, or leave it out."
        )
    input_dtype: torch.dtype = cast(Any, model).dtype if dtype is None else dtype
    if embeddings is not None:
        round_embeddings(model)
        layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    shared, used = shared_codes(model), Counter[str]()
    for layer in layers:
        layer.use(None)  # kernels pack codes as they are stored, and an earlier product may hold them
        kernel = choose_kernel(layer, input_dtype, None if layer.source_signs else activations)
        if kernel is not None:
            use_kernel(layer, kernel, shared)
        used["plain" if kernel is None else kernel.name] += 1
    fuse_attention_projections(model)  # both look at the products that the layers have by now
    fuse_gates(model)
    if layers or input_dtype == torch.bfloat16:  # a small model in float32 is not worth a compilation
        use_calls_between_products(model)
        use_decoding_layers(model)
    if input_dtype == torch.bfloat16:
        use_small_batch_products(model)
    return dict(used)


def shared_codes(model: nn.Module) -> frozenset[int]:
    """Return the ids of code tensors that two modules hold: ChatGLM-6B's head is tied to its embedding."""
    modules = [m for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    owners = Counter(id(module.weight) for module in modules)
    return frozenset(weight for weight, count in owners.items() if count > 1)


def use_kernel(layer: QuantizedLinear, kernel: Kernel, shared: frozenset[int]) -> None:
    """Let a layer multiply by a kernel's product, which may take its codes over.

    Args:
        layer: codes, without a product.
        kernel: one that takes the layer.
        shared: from `shared_codes`; the embedding looks its rows up in the same codes, so they must stay.
    """
    product = kernel.prepared(layer)
    layer.use(dataclasses.replace(product, storage=None) if id(layer.weight) in shared else product)


def choose_kernel(
    layer: QuantizedLinear, dtype: torch.dtype, activations: str | None = None
) -> Kernel | None:
    """Return the first kernel that takes a layer, None for the plain path; why others refused is logged once.

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
    """Try Triton's kernels on a small layer of a format; say why they cannot be used, "" if they can.

    Triton compiles on first use and can fail, or be wrong, by driver, GPU and version, none of
    which a check of version numbers would cover; a wrong product would only show in worse
    answers. Once per format and process.
    """
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
    except Exception as error:  # a compiler may raise anything; the plain path remains
        return f"Triton fails here ({type(error).__name__}: {str(error).strip().splitlines()[:1]})"
    expected, gradient = x_RI @ weight_OI.T, x_RI[:, :48] @ weight_OI
    # 3 %: bfloat16 outputs are off by 0.4 %, while a mistake in layout or scale is off by everything.
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
