"""Query, key and value projections as one fused product, behind three layers that stay as they were.

Attention of transformers calls three layers with one input, and adapters wrap each of them, so the modules
have to stay. One product for all three reads the input once and starts the threads once; with the few rows of
decoding that start is a good part of the time::

    q_proj(x)  computes x [Wq; Wk; Wv]ᵀ, returns its part, keeps the rest together with x
    k_proj(x)  the same x?  returns the part kept        another x?  its own product
    v_proj(x)  the same; the last one lets x go

No layer depends on the others being called, or being called in this order: only the time does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from glmtune.quantization.kernels.packed import PackedCodes, PackedProduct
from glmtune.quantization.layers.linear import QuantizedLinear

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")


@dataclass(slots=True)
class _Pending:
    """Outputs not fetched yet, and the input they belong to.

    The input is compared by its address. Holding it keeps that address from being given to another tensor.
    """

    x_RI: Tensor
    outputs: dict[int, Tensor]


class FusedProducts:
    """Several products with one input, computed as one.

    Attributes:
        whole: the product with all weights, one behind the other.
        parts: the single products, views of its memory.
    """

    def __init__(self, whole: PackedProduct, parts: Sequence[PackedProduct]) -> None:
        """Take the products, the first of which will compute all."""
        self.whole, self.parts = whole, tuple(parts)
        self._pending: _Pending | None = None

    def multiply(self, index: int, x_RI: Tensor) -> Tensor:
        """Return one part's product; the first computes all.

        Args:
            index: of the part.
            x_RI: not changed in place between the calls.
        """
        pending = self._pending  # read once: another thread may put in its own meanwhile
        if index == 0:
            outputs = dict(
                enumerate(self.whole(x_RI).split([part.packed.outputs for part in self.parts], dim=1))
            )
            self._pending = _Pending(x_RI, outputs)
            return outputs.pop(0)
        if pending is None or index not in pending.outputs or not _is_same(pending.x_RI, x_RI):
            return self.parts[index](x_RI)
        output = pending.outputs.pop(index)  # handed out once, as the caller may change it in place
        if not pending.outputs:
            self._pending = None
        return output


@dataclass(frozen=True, slots=True)
class FusedPart:
    """One of several products that are computed as one.

    Attributes:
        fused: all of them.
        index: which.
    """

    fused: FusedProducts
    index: int

    def __call__(self, x_RI: Tensor) -> Tensor:
        """Return ``x @ weight.T``, ``[R, O]``."""
        return self.fused.multiply(self.index, x_RI)


def fuse_attention_projections(model: nn.Module) -> int:
    """Fuse query, key and value projections wherever their products are native and fit each other.

    Args:
        model: its layers have their products; mutated.

    Returns:
        How many attention modules were changed.
    """
    changed = 0
    for module in list(model.modules()):
        projections = [getattr(module, name, None) for name in ATTENTION_INPUTS]
        layers = [getattr(layer, "base_layer", layer) for layer in projections]  # below an adapter of PEFT
        if all(isinstance(layer, QuantizedLinear) for layer in layers):
            changed += _fuse(cast("list[QuantizedLinear]", layers))
    return changed


def _fuse(layers: Sequence[QuantizedLinear]) -> bool:
    products = [layer.product for layer in layers]
    native = [
        product.multiply
        for product in products
        if product is not None and isinstance(product.multiply, PackedProduct)
    ]
    if len(native) < len(layers) or not all(native[0].can_be_fused_with(other) for other in native[1:]):
        return False
    # The fused weight is the only copy: each layer's storage becomes a view of it,
    # from which it saves itself.
    whole, views = PackedCodes.concatenated([product.packed for product in native])
    rounded = native[0].rounded
    fused = FusedProducts(PackedProduct(whole, rounded), [PackedProduct(view, rounded) for view in views])
    for index, (layer, product, view) in enumerate(zip(layers, products, views, strict=True)):
        assert product is not None
        multiply = FusedPart(fused, index)
        storage = None if product.storage is None else view
        # Not `layer.use`, which would unpack the codes from the product that is replaced, to pack them again.
        layer.product = replace(product, multiply=multiply, storage=storage, weight=view.weight)
    return True


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.dtype == other.dtype
