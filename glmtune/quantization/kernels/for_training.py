"""Training over codes on CPUs: the exact native product for the layers, nothing else of inference.

Fused projections, fused gates and rounded activations are left out: they have no backward pass, and adapters
of PEFT wrap single projections. The backward pass to the input forms the weight some outputs at a time, from
the product's panels (`glmtune.quantization.layers.linear`).
"""

from __future__ import annotations

import torch
from torch import nn

from glmtune.quantization.kernels.dispatch import NativeProduct, shared_codes, use_kernel
from glmtune.quantization.layers.compiled import give_number
from glmtune.quantization.layers.linear import QuantizedLinear


def prepare_for_training(model: nn.Module) -> int:
    """Give the layers of codes on a CPU their native product, forward and backward.

    Inputs may be float32, bfloat16 or float16, under autocast too. In a model that `torch.compile` is to
    compile the product is an operator of its graph. Layers stay on the plain path where nothing can be
    compiled, and where ZeRO-3 has left a process only its part of the codes (ZeRO-1 and 2 leave them whole).
    A cast or a move of the model takes the products away again.

    Args:
        model: mutated; its layers hold their codes in the product's order from now on.

    Returns:
        How many layers have the product.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    kernel, shared = NativeProduct(), shared_codes(model)
    # DeepSpeed puts `ds_id` on the parameters that it divides. float32 stands for every type: native products
    # take all three.
    chosen = [
        layer
        for layer in layers
        if not hasattr(layer.weight, "ds_id") and not kernel.refusal(layer, torch.float32)
    ]
    # `module.compile()` leaves its mark here (torch 2.13).
    compiles = bool(chosen) and any(module._compiled_call_impl is not None for module in model.modules())
    for layer in chosen:
        layer.use(None)
        use_kernel(layer, kernel, shared)
        if compiles:
            give_number(layer)
    return len(chosen)
