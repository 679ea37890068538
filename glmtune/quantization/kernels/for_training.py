"""Training over codes on CPUs: the exact products of inference, without what only inference needs."""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch
from torch import nn

from glmtune.quantization.kernels.dispatch import NativeProduct
from glmtune.quantization.layers.linear import QuantizedEmbedding, QuantizedLinear


def prepare_for_training(model: nn.Module) -> int:
    """Give the layers of codes on a CPU their native product, forward and backward.

    Inputs may be float32, bfloat16 or float16, under autocast too. Where nothing can be compiled, and
    in a model that `torch.compile` is to compile, layers stay on the plain path. A cast or a move of the
    model takes the products away again.

    Args:
        model: mutated; its layers hold their codes in the product's order from now on.

    Returns:
        How many layers have the product.
    """
    modules = [item for item in model.modules() if isinstance(item, QuantizedLinear | QuantizedEmbedding)]
    if not modules or any(item._compiled_call_impl is not None for item in model.modules()):
        return 0
    kernel, owners = NativeProduct(), Counter(id(item.weight) for item in modules)
    layers = [item for item in modules if isinstance(item, QuantizedLinear)]
    chosen = [layer for layer in layers if not kernel.refusal(layer, torch.float32)]
    for layer in chosen:
        layer.use(None)
        product = kernel.prepared(layer)
        shared = owners[id(layer.weight)] > 1  # an embedding looks its rows up in the same codes
        layer.use(dataclasses.replace(product, stored=None) if shared else product)
    return len(chosen)
