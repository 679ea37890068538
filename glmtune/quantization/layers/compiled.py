"""The native product of a layer of codes as an operator of PyTorch, which `torch.compile` keeps in its graph.

A native product is a call through ctypes with addresses of memory, at which the compiler would cut its graph
in two at every layer. An operator is a box to it: it knows the shape of the result and which operator gives
the gradient, and calls both as they are. Operators take tensors and numbers, so a layer is found by a number,
and that is a tensor: layers of one kind share one compiled graph, which a plain number would be baked into.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from glmtune.quantization.layers.linear import QuantizedLinear

_LAYERS: WeakValueDictionary[int, QuantizedLinear] = WeakValueDictionary()
_NUMBERS = itertools.count()


def give_number(layer: QuantizedLinear) -> None:
    """Let compiled graphs call a layer's product.

    Args:
        layer: with a product that takes all inputs and forms weights, as the native one does; mutated. The
            next product takes the number away.
    """
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    layer.number = torch.tensor(number)


# mutates_args and the schema (from the annotations, hence no lazy ones here): torch 2.13, `torch.library`.
def _multiply(x: Tensor, number: Tensor, outputs: int) -> Tensor:
    if not x.numel():
        return x.new_zeros(*x.shape[:-1], outputs)
    product = _LAYERS[int(number)].product
    assert product is not None
    output_RO = product.multiply(x.reshape(-1, x.shape[-1]))
    assert output_RO is not None
    return output_RO.unflatten(0, x.shape[:-1])


def _input_gradient(gradient: Tensor, number: Tensor, inputs: int) -> Tensor:
    del inputs  # for the shape alone
    return _LAYERS[int(number)].input_gradient(gradient).contiguous()


_SCHEMAS = {
    "multiply_codes": "(Tensor x, Tensor number, SymInt outputs) -> Tensor",
    "codes_input_gradient": "(Tensor gradient, Tensor number, SymInt inputs) -> Tensor",
}
_OPERATORS = {
    name: torch.library.custom_op(f"glmtune::{name}", function, mutates_args=(), schema=_SCHEMAS[name])
    for name, function in (("multiply_codes", _multiply), ("codes_input_gradient", _input_gradient))
}


def _like(x: Tensor, number: Tensor, width: int) -> Tensor:
    del number
    return x.new_empty(*x.shape[:-1], width)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    del output
    x, number, _ = inputs
    ctx.save_for_backward(number)
    ctx.inputs = x.shape[-1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (number,) = ctx.saved_tensors
    return torch.ops.glmtune.codes_input_gradient(gradient, number, ctx.inputs), None, None


for _operator in _OPERATORS.values():
    _operator.register_fake(_like)
_OPERATORS["multiply_codes"].register_autograd(_backward, setup_context=_keep)
