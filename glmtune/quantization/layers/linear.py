"""Layers that hold codes instead of weights: forward, and backward to their input.

A layer of codes computes ``y = x Wᵀ`` in one of two ways. The plain path, here, dequantizes the weight piece
by piece and multiplies; it works for every type, shape and device and is the reference. A `Product`, set by
`glmtune.quantization.kernels`, multiplies by the codes themselves. It may hold the codes in an order of its
own, and then it holds the only copy: two would double the memory that quantization is to save.

Shapes: O output features, I input features, G groups of a row; any number of leading axes before I.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from glmtune.models.checkpoints.quantized_layout import SCALE, ZERO, QuantizedLayout
from glmtune.quantization.arithmetic.chunking import dequantize_packed
from glmtune.quantization.arithmetic.packing import pack, unpack
from glmtune.quantization.arithmetic.primitives import QuantizedTensor, dequantize

CODE_PARAMETERS: tuple[str, ...] = ("weight", SCALE, ZERO)
"""Parameters that make a weight."""
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types in which `Product.weight` forms weights; in others (float64 in tests) the plain path does."""
OUTPUTS_AT_ONCE = 512
"""Outputs whose weights are in floating point at the same time on a CPU, in forward and backward: 8 MiB in
float32 at 4,096 inputs, where the gate and up projection of a 6B model (27,392 outputs) would be 428 MiB. A
multiple of every panel that kernels pack outputs into, so that a piece can be unpacked alone."""
WHOLE_ELSEWHERE, OUTPUTS_AT_ONCE_ELSEWHERE = 2**15, 2**13
"""On other devices, where every piece costs several kernel launches, up to so many outputs are formed at
once, which is enough for the blocks of 6B and 9B models; wider layers, above all heads of 65,024 to 151,552
outputs (4 GiB at 4,096 inputs), are formed in pieces of the second number."""


class PackedStorage(Protocol):
    """Parameters of a layer that its product keeps in another order, such as panels of 64 outputs."""

    @property
    def names(self) -> tuple[str, ...]:
        """Which of `CODE_PARAMETERS`; no other copy of them exists."""
        ...

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return a parameter in the order of the checkpoint, some outputs or all.

        Args:
            name: one of `names`.
            start: the first output, a multiple of `OUTPUTS_AT_ONCE`.
            stop: behind the last output; None: all. It is such a multiple, too, or beyond the last output.
        """
        ...


@dataclass(frozen=True, slots=True)
class Product:
    """A faster forward of one layer than the plain one, from `glmtune.quantization.kernels.dispatch`.

    Attributes:
        multiply: rows ``[R, I]`` to ``[R, O]``; None for those it leaves to the plain path.
        dtypes: of the inputs it takes.
        storage: parameters that the product holds the only copy of; None: the layer keeps all of them.
        weight: forms the weights ``[stop - start, I]`` of some outputs (see `PackedStorage`) in one of
            `WEIGHT_DTYPES`, the same numbers as the plain path; None: the plain path.
        input_gradient: gradients of outputs ``[R, O]`` to those of inputs ``[R, I]``; None: the plain path.
    """

    multiply: Callable[[Tensor], Tensor | None]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    storage: PackedStorage | None = None
    weight: Callable[[int, int, torch.dtype], Tensor] | None = None
    input_gradient: Callable[[Tensor], Tensor] | None = None


class _Codes(nn.Module):
    """Codes with their scales; they move with the module but are never cast.

    Attributes:
        weight: int8 ``[O, I]``, or ``[O, I / 2]`` packed (4 bits).
        weight_scale: float16 ``[O]`` or ``[O, G]``.
        weight_zero: float16 ``[O, G]``, or None.
        bits: 4 or 8.
        group_size: columns that share a scale, None: the row.
        source_signs: sampled of the weight that a loaded model's codes were rounded from, for its fingerprint
            (`glmtune.quantization.layers.embeddings`); None: the configuration tells of these codes.
    """

    source_signs: bytes | None = None
    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero: nn.Parameter | None
    bits: int
    group_size: int | None

    def _make_codes(self, rows: int, columns: int, layout: QuantizedLayout) -> None:
        shapes = layout.shapes((rows, columns))
        self.bits, self.group_size = layout.bits, layout.group_size
        self.weight = _frozen(torch.zeros(shapes["weight"], dtype=torch.int8))
        self.weight_scale = _frozen(torch.ones(shapes[SCALE], dtype=torch.float16))
        if ZERO in shapes:
            self.weight_zero = _frozen(torch.zeros(shapes[ZERO], dtype=torch.float16))
        else:
            self.register_parameter(ZERO, None)

    def stored(self) -> dict[str, Tensor]:
        """Return codes, scales and zero points by name, even while a product holds them instead."""
        return {n: self.stored_tensor(n) for n in CODE_PARAMETERS if getattr(self, n) is not None}

    def stored_tensor(self, name: str) -> Tensor:
        """Return one of them."""
        return getattr(self, name)

    def stored_codes(self) -> Tensor:
        """Return the codes alone."""
        return self.stored_tensor("weight")

    def quantized(self) -> QuantizedTensor:
        """Return the codes unpacked, with scales."""
        held = self.stored()
        return _unpacked(held["weight"], held[SCALE], held.get(ZERO), self.bits, self.group_size)

    def put(self, quantized: QuantizedTensor) -> None:
        """Copy codes, scales and zero points in."""
        with torch.no_grad():
            self.weight.copy_(pack(quantized.codes_OI, bits=self.bits))
            self.weight_scale.copy_(quantized.scale)
            if self.weight_zero is not None and quantized.zero is not None:
                self.weight_zero.copy_(quantized.zero)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``[O, I]``."""
        held = self.stored()
        codes = (held["weight"], held[SCALE], held.get(ZERO))
        return dequantize_packed(*codes, bits=self.bits, group_size=self.group_size, dtype=dtype)

    # torch's Module calls `_apply` for every cast and move (`.to`, `.half()`, `.cuda()`; torch 2.13). It
    # leaves the int8 codes alone in a cast, but a scale is floating point: float16 -> bfloat16 would lose
    # three bits for good.
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        names = [name for name in (SCALE, ZERO) if getattr(self, name) is not None]
        before = {name: getattr(self, name).data for name in names}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new: nn.Parameter = getattr(self, name)
            if new.dtype != old.dtype:  # take the device of the new one, but the old numbers
                fresh = torch.empty_like(old, device=new.device) if old.is_meta else old.to(new.device)
                new.data = fresh
        return self


class QuantizedLinear(_Codes, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A linear layer whose weight is codes, frozen; its bias stays floating point and may train.

    The result has the type of the input (under autocast: autocast's), as that of a linear layer in that type;
    the gradient of the input is that of the dequantized weight. The floating point weight exists only inside
    forward and backward.

    Attributes:
        product: a faster forward than the plain one. Parameters in its storage are on the meta device here
            meanwhile: they keep their shape, take no memory, and reading them by mistake is an error. Saving,
            copies, casts and moves unpack them first, so from outside nothing has changed.
        number: int64, by which a compiled graph finds this layer (`glmtune.quantization.layers.compiled`);
            None where the compiler follows the product itself.
    """

    product: Product | None
    number: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        layout: QuantizedLayout,
        bias: nn.Parameter | None = None,
    ) -> None:
        """Make a layer of zeros.

        Args:
            in_features: I.
            out_features: O.
            layout: bits, groups and zero points.
            bias: ``[O]``, used as it is.
        """
        nn.Module.__init__(self)  # a float weight is never made
        self.in_features, self.out_features = in_features, out_features
        self.product = self.number = None
        self._make_codes(out_features, in_features, layout)
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``: ``[..., I]`` to ``[..., O]``."""
        device = input.device.type
        if torch.is_autocast_enabled(device):  # autocast knows `nn.functional.linear`, not our product
            input = input.to(torch.get_autocast_dtype(device))
        number = self.number
        if number is not None and input.dtype in WEIGHT_DTYPES and torch.compiler.is_compiling():
            made: Tensor = torch.ops.glmtune.multiply_codes(input, number, self.out_features)
            return made if self.bias is None else made + self.bias.to(made.dtype)
        codes = (self.weight, self.weight_scale, self.weight_zero)
        product = self.product
        if product is not None and not torch.is_grad_enabled():
            found = _multiplied(input, product)  # decoding: without the cost of autograd's bookkeeping
            if found is not None:
                return found if self.bias is None else found + self.bias.to(found.dtype)
        output: Tensor = _CodesProduct.apply(input, *codes, self.bits, self.group_size, product)  # type: ignore[assignment]
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """Return ``gradient @ weight``, ``[..., O]`` to ``[..., I]``, as the backward pass does."""
        codes = (self.weight, self.weight_scale, self.weight_zero)
        return _input_gradient(gradient, _WeightPieces(self, codes, gradient.dtype))

    def use(self, product: Product | None) -> None:
        """Take a product, which may hold codes and scales from now on; None: hold them here again."""
        taken = () if product is None or product.storage is None else product.storage.names
        for name, held in self.stored().items():
            tensor = torch.empty_like(held, device="meta") if name in taken else held
            if tensor is not getattr(self, name):
                setattr(self, name, _frozen(tensor))
        self.product, self.number = product, None

    def stored_tensor(self, name: str) -> Tensor:
        """Return codes, scales or zero points, even while a product holds them instead."""
        storage = None if self.product is None else self.product.storage
        return getattr(self, name) if storage is None or name not in storage.names else storage.tensor(name)

    def put(self, quantized: QuantizedTensor) -> None:
        """Copy codes, scales and zero points in."""
        self.use(None)
        super().put(quantized)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self.use(None)  # the product was made for the old device and dtype
        return super()._apply(fn, recurse)

    # Called by `copy.deepcopy` and `pickle`. Products hold memory addresses and closures, which do not
    # survive either.
    def __getstate__(self) -> dict[str, Any]:
        if self.product is None:
            return self.__dict__
        held = {name: _frozen(tensor) for name, tensor in self.stored().items()}
        parameters = {**self._parameters, **held}
        # The number stands for this layer: compiled, a copy would multiply by the codes of this one.
        return {**self.__dict__, "product": None, "number": None, "_parameters": parameters}

    # Called by `state_dict` for every module (torch 2.13): meta tensors would be saved as nothing.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        storage = None if self.product is None else self.product.storage
        for name in () if storage is None else storage.names:
            destination[prefix + name] = self.stored_tensor(name)

    # Called by `load_state_dict`, which copies into the parameters: they must be here for that.
    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.use(None)
        super()._load_from_state_dict(*arguments, **options)

    def reset_parameters(self) -> None:
        """Do nothing: codes come from a weight."""

    def extra_repr(self) -> str:
        """Name sizes and format."""
        group = "per row" if self.group_size is None else f"group size {self.group_size}"
        sizes = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self.bits} bits, {group}"


class QuantizedEmbedding(_Codes, nn.Embedding):  # pyright: ignore[reportIncompatibleVariableOverride]
    """An embedding whose rows are codes; only the rows looked up become floating point."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, layout: QuantizedLayout, dtype: torch.dtype | None
    ) -> None:
        """Make an embedding of zeros.

        Args:
            num_embeddings: rows.
            embedding_dim: columns.
            layout: bits, groups and zero points.
            dtype: of the result; it follows casts of the module. None: torch's default.
        """
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = self.max_norm = None
        self._make_codes(num_embeddings, embedding_dim, layout)
        # Codes have no floating type, so nothing else would say what the result is after `.half()`. A buffer
        # is cast with the module; it is empty and not saved.
        self.output_like = nn.Buffer(torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return rows ``[..., columns]`` for ids ``[...]``."""
        flat = input.reshape(-1)
        zero = None if self.weight_zero is None else self.weight_zero[flat]
        rows = _unpacked(self.weight[flat], self.weight_scale[flat], zero, self.bits, self.group_size)
        return dequantize(rows, self.output_like.dtype).reshape(*input.shape, self.embedding_dim)

    def reset_parameters(self) -> None:
        """Do nothing: codes come from a weight."""

    def extra_repr(self) -> str:
        """Name sizes and format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.bits} bits"


class _CodesProduct(torch.autograd.Function):
    """``x Wᵀ`` and its gradient to x; the weight is formed again for the backward pass, not kept.

    autograd would keep the floating point weight of every layer from the forward pass to the backward pass:
    all of what quantization saved. Codes get no gradient, so the input is not kept either.

    Shapes: forward takes x ``[..., I]`` and returns ``[..., O]``; backward takes ``[..., O]`` and returns
    ``[..., I]``. Codes, scales and zero points are as in `_Codes`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bits: int,
        group_size: int | None,
        product: Product | None,
    ) -> Tensor:
        ctx.save_for_backward(packed, scale, zero)
        ctx.bits, ctx.group_size, ctx.product = bits, group_size, product
        output = None if product is None else _multiplied(input, product)
        if output is not None:
            return output
        pieces = _WeightPieces(ctx, (packed, scale, zero), input.dtype)
        if len(pieces.ranges) == 1:
            return nn.functional.linear(input, pieces.weight(*pieces.ranges[0]))
        output = input.new_empty(*input.shape[:-1], len(packed))
        for outputs in pieces.ranges:
            output[..., slice(*outputs)] = input @ pieces.weight(*outputs).T
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        product, gradient = ctx.product, grads[0]
        if product is not None and product.input_gradient is not None and gradient.dtype in product.dtypes:
            found_RI = product.input_gradient(gradient.reshape(-1, gradient.shape[-1]))
            found = found_RI.reshape(*gradient.shape[:-1], found_RI.shape[-1])
        else:
            found = _input_gradient(gradient, _WeightPieces(ctx, ctx.saved_tensors, gradient.dtype))
        return found, None, None, None, None, None, None


class _WeightPieces:
    """The floating point weight of a layer, formed for `OUTPUTS_AT_ONCE` outputs at a time.

    Attributes:
        ranges: of outputs: the first of a piece, and the one behind its last.
    """

    def __init__(self, ctx: Any, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        """Take codes, scales and zero points as the layer has them, and the type of the weight.

        Args:
            ctx: of autograd, or the layer: what has a product, bits and a group size.
            tensors: in the order of `CODE_PARAMETERS`.
            dtype: of the weight.
        """
        product = ctx.product
        self._storage, self._fast = (None, None) if product is None else (product.storage, product.weight)
        self._tensors: dict[str, Tensor | None] = dict(zip(CODE_PARAMETERS, tensors, strict=True))
        self._dtype, self._format = dtype, {"bits": ctx.bits, "group_size": ctx.group_size}
        packed = tensors[0]
        assert packed is not None
        # Meta: a CPU product holds the codes.
        on_cpu = packed.device.type in ("cpu", "meta")
        step = OUTPUTS_AT_ONCE if on_cpu else len(packed)
        if step > WHOLE_ELSEWHERE:
            step = OUTPUTS_AT_ONCE_ELSEWHERE
        self.ranges = [(start, min(start + step, len(packed))) for start in range(0, len(packed), step)]

    def weight(self, start: int, stop: int) -> Tensor:
        """Return the weight of some outputs, ``[stop - start, I]``."""
        if self._fast is not None and self._dtype in WEIGHT_DTYPES:
            return self._fast(start, stop, self._dtype)
        tensors = [self._rows(name, start, stop) for name in CODE_PARAMETERS]
        return dequantize_packed(*tensors, **self._format, dtype=self._dtype)  # type: ignore[arg-type]

    def _rows(self, name: str, start: int, stop: int) -> Tensor | None:
        if self._storage is not None and name in self._storage.names:
            return self._storage.tensor(name, start, stop)
        tensor = self._tensors[name]
        return None if tensor is None else tensor[start:stop]


def _input_gradient(gradient: Tensor, pieces: _WeightPieces) -> Tensor:
    """Return ``gradient @ weight``: ``[..., O]`` to ``[..., I]``.

    The sum over O is cut into pieces; each partial sum is rounded to the gradient's type, so they are added
    in float32: adding up to 54 of them in bfloat16 would round at every step.
    """
    if len(pieces.ranges) == 1:
        return gradient @ pieces.weight(*pieces.ranges[0])
    found: Tensor | None = None
    for outputs in pieces.ranges:
        part = gradient[..., slice(*outputs)] @ pieces.weight(*outputs)
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        found = part if found is None else found.add_(part)
    assert found is not None
    return found.to(gradient.dtype)


def _multiplied(input: Tensor, product: Product) -> Tensor | None:
    """Return the product's output ``[..., O]``; None for inputs it does not take."""
    if input.dtype not in product.dtypes or not input.numel():
        return None
    output_RO = product.multiply(input.reshape(-1, input.shape[-1]))
    return None if output_RO is None else output_RO.unflatten(0, input.shape[:-1])


def _unpacked(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int | None
) -> QuantizedTensor:
    return QuantizedTensor(unpack(packed, bits=bits), scale, zero, group_size)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
