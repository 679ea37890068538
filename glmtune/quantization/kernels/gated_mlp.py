"""The MLP of a block over native products: gate and up projection leave one product, already multiplied.

GLM keeps gate and up projection in one weight, gate first: ``down(silu(g) * u)`` with ``[g; u] = W x``. The
native product computes the panel of g and that of u with the same outputs one after the other, multiplies
them in registers, and writes half as much: 13,696 numbers per row instead of 27,392 written and read again.
As nothing is rounded to bfloat16 in between, the result is a little nearer to the exact one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.glm.modeling_glm import GlmMLP
from transformers.models.glm4.modeling_glm4 import Glm4MLP

from glmtune.quantization.kernels.packed import DTYPE_NUMBERS, PANEL, PackedProduct
from glmtune.quantization.layers.linear import QuantizedLinear


class _GatedInside:
    """An MLP whose gate is applied inside the product; whatever that does not take, its parent computes."""

    gate_up_proj: Any
    down_proj: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return ``down(silu(gate(x)) * up(x))``: ``[..., I]`` to ``[..., I]``."""
        # Looked up in every call: a cast or an adapter of PEFT takes the native product away.
        product = _native_product(self.gate_up_proj)
        x_RI = hidden_states.reshape(-1, hidden_states.shape[-1])
        if product is None or not _takes(x_RI) or product.prefers_matrices(x_RI):
            parent: Any = super()
            return parent.forward(hidden_states)
        gated_RF = product.gated(x_RI)
        return self.down_proj(gated_RF.unflatten(0, hidden_states.shape[:-1]))


class GatedMLP(_GatedInside, GlmMLP):
    """The MLP of `GlmForCausalLM`, its gate inside the product."""


class GatedGlm4MLP(_GatedInside, Glm4MLP):
    """The MLP of `Glm4ForCausalLM`, which is the same class under another name."""


GATED: dict[type[nn.Module], type[nn.Module]] = {GlmMLP: GatedMLP, Glm4MLP: GatedGlm4MLP}
"""transformers' class → ours."""


def fuse_gates(model: nn.Module) -> int:
    """Let the MLPs of a model apply their gate inside the product, where that is native.

    Args:
        model: its layers have their products; mutated.

    Returns:
        How many MLPs were changed.
    """
    mlps = [module for module in model.modules() if type(module) in GATED and _can_be_fused(module)]
    for mlp in mlps:  # the class alone changes: parameters, hooks and names stay those of the module
        mlp.__class__ = GATED[type(mlp)]
    return len(mlps)


def _can_be_fused(mlp: Any) -> bool:
    # A half must end with a panel: the kernel pairs whole panels of the two halves.
    halves = mlp.config.intermediate_size
    is_silu = mlp.config.hidden_act in ("silu", "swish")
    return is_silu and not halves % PANEL and _native_product(mlp.gate_up_proj) is not None


def _native_product(layer: nn.Module) -> PackedProduct | None:
    """Return the product of a layer of codes without bias, if it is native."""
    if type(layer) is not QuantizedLinear or layer.product is None or layer.bias is not None:
        return None
    multiply = layer.product.multiply
    return multiply if isinstance(multiply, PackedProduct) else None


def _takes(x: Tensor) -> bool:
    needs_parent = (
        torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()
    )
    return x.dtype in DTYPE_NUMBERS and x.device.type == "cpu" and x.numel() > 0 and not needs_parent
