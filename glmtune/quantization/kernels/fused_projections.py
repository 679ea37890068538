"""Query, key and value projections computed as one product, the layers themselves as they were.

The first of the three multiplies by all three weights and hands the other two their part when they are called
with the same input. One that is called with another input, or alone, computes its own.
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
class _Held:
    """Outputs not fetched yet, and the input they belong to (held, so that its memory is not another's)."""

    x_RI: Tensor
    outputs: dict[int, Tensor]


class JoinedProducts:
    """Products with one input.

    Attributes:
        whole: all weights behind each other.
        parts: views of it.
    """

    def __init__(self, whole: PackedProduct, parts: Sequence[PackedProduct]) -> None:
        """Take them."""
        self.whole, self.parts = whole, tuple(parts)
        self._held: _Held | None = None

    def multiply(self, index: int, x_RI: Tensor) -> Tensor:
        """Return one part's product; the first computes all.

        Args:
            index: of the part.
            x_RI: not changed in place between the calls.
        """
        held = self._held  # once: another thread may put in its own meanwhile
        if index == 0:
            outputs = dict(
                enumerate(self.whole(x_RI).split([part.packed.outputs for part in self.parts], dim=1))
            )
            self._held = _Held(x_RI, outputs)
            return outputs.pop(0)
        if held is None or index not in held.outputs or not _same(held.x_RI, x_RI):
            return self.parts[index](x_RI)
        output = held.outputs.pop(index)
        if not held.outputs:
            self._held = None
        return output


def join_attention_inputs(model: nn.Module) -> int:
    """Join query, key and value projections wherever their products are native and fit each other.

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
            changed += _join(cast("list[QuantizedLinear]", layers))
    return changed


def _join(layers: Sequence[QuantizedLinear]) -> bool:
    products = [layer.product for layer in layers]
    native = [
        product.multiply
        for product in products
        if product is not None and isinstance(product.multiply, PackedProduct)
    ]
    if len(native) < len(layers) or not all(native[0].goes_with(other) for other in native[1:]):
        return False
    whole, views = PackedCodes.joined([product.packed for product in native])
    rounded = native[0].rounded
    joined = JoinedProducts(PackedProduct(whole, rounded), [PackedProduct(view, rounded) for view in views])
    for index, (layer, product, view) in enumerate(zip(layers, products, views, strict=True)):
        assert product is not None

        def multiply(x_RI: Tensor, index: int = index) -> Tensor:
            return joined.multiply(index, x_RI)

        stored = None if product.stored is None else view
        layer.product = replace(product, multiply=multiply, stored=stored, weight=view.weight)
    return True


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.dtype == other.dtype
