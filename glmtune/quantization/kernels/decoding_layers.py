"""A GLM's layer for a few tokens on a CPU: its native products and what is between them, called directly.

A decoded token goes through some ten modules in each layer, and calling a module takes longer than what most
of them do. This layer calls the compiled functions of its own modules by itself, in the same order on the
same numbers, so that what comes out is the same to the last bit. It does so only while its modules are as
`use_decoding_layers` found them: an adapter around one, a hook, a cast or another product, and the layer is
that of transformers again, which calls them all.

Shapes: B rows, S tokens, R = B S, D hidden width, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import GlmDecoderLayer, eager_attention_forward
from transformers.models.glm4.modeling_glm4 import Glm4DecoderLayer

from glmtune.quantization.kernels.between_products import NORMS, normed, rotated
from glmtune.quantization.kernels.fused_projections import ATTENTION_INPUTS, FusedPart
from glmtune.quantization.kernels.gated_mlp import GATED
from glmtune.quantization.kernels.packed import PackedProduct
from glmtune.quantization.layers.linear import Product, QuantizedLinear

MOST_ROWS = 8
"""Tokens of a pass up to which calling modules is a good part of the time."""
INPUTS = tuple(f"self_attn.{name}" for name in ATTENTION_INPUTS)
OUTPUTS = ("self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
GLM4_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")
"""Norms of what attention and MLP add, which GLM-4-0414 has and the others have not."""


@dataclass(frozen=True, slots=True)
class _Calls:
    """What a layer calls.

    Attributes:
        owners: each module below the layer with its parent and its name there.
        layers: those of `INPUTS` and `OUTPUTS`, with the product each had.
        qkv: query, key and value as one product.
        bias: of the three, ``[(N + 2 K) H]``; None: they have none.
        out: of the attention.
        gated: gate and up projection.
        down: of the MLP.
    """

    owners: tuple[tuple[dict[str, Any], str, nn.Module], ...]
    layers: tuple[tuple[QuantizedLinear, Product], ...]
    qkv: PackedProduct
    bias: Tensor | None
    out: PackedProduct
    gated: PackedProduct
    down: PackedProduct

    def are_current(self) -> bool:
        """Say whether the modules are those that were found, nothing listening to them."""
        return (
            all(children.get(name) is module for children, name, module in self.owners)
            and all(layer.product is product for layer, product in self.layers)
            and not any(
                module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
                for _, _, module in self.owners
            )
            and not torch_module._global_forward_hooks
            and not torch_module._global_forward_pre_hooks
        )


_CALLS: WeakKeyDictionary[nn.Module, _Calls] = WeakKeyDictionary()
"""By layer, beside the layers themselves: addresses of compiled products do not survive a copy of them."""


class _FewTokens:
    """A layer that calls compiled functions directly; whatever that does not take, its parent computes."""

    self_attn: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the hidden states behind the layer, ``[B, S, D]``; arguments as in transformers."""
        calls = _CALLS.get(self)  # pyright: ignore[reportArgumentType]
        is_taken = calls is not None and _takes(hidden_states, position_embeddings) and calls.are_current()
        if calls is None or not is_taken or "past_key_values" in kwargs:  # the cache's name before 5.24
            parent: Any = super()
            return parent.forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        assert position_embeddings is not None
        # transformers hands these two to the attention function, too.
        kwargs |= {"position_ids": position_ids, "use_cache": use_cache}
        attention = self.self_attn
        heads, groups = attention.config.num_attention_heads, attention.config.num_key_value_heads
        batch, tokens, width = hidden_states.shape
        x_RD = hidden_states.reshape(-1, width)

        qkv_RO = calls.qkv(_norm(self.input_layernorm, x_RD))
        if calls.bias is not None:
            qkv_RO += calls.bias
        states_BNSH = qkv_RO.view(batch, tokens, heads + 2 * groups, -1).transpose(1, 2)
        turned_BNSH = rotated(states_BNSH[:, : heads + groups], *position_embeddings)
        query, key = turned_BNSH[:, :heads], turned_BNSH[:, heads:]
        value = states_BNSH[:, heads + groups :]
        if cache is not None:
            key, value = cache.update(key, value, attention.layer_idx, kwargs=kwargs)
        implementation = attention.config._attn_implementation
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        mixed, _ = attend(
            attention, query, key, value, attention_mask, dropout=0.0, scaling=attention.scaling, **kwargs
        )
        x_RD = x_RD + self._added(0, calls.out(mixed.reshape(len(x_RD), -1)))
        gated_RF = calls.gated.gated(_norm(self.post_attention_layernorm, x_RD))
        return (x_RD + self._added(1, calls.down(gated_RF))).view(batch, tokens, width)

    def _added(self, place: int, x_RD: Tensor) -> Tensor:
        """Return what attention (0) or MLP (1) adds to the hidden states."""
        del place
        return x_RD


class DecodingGlmLayer(_FewTokens, GlmDecoderLayer):
    """That of `GlmForCausalLM`: ChatGLM2, CodeGeeX2, ChatGLM3, GLM-4, GLM-Edge."""


class DecodingGlm4Layer(_FewTokens, Glm4DecoderLayer):
    """That of `Glm4ForCausalLM`: GLM-4-0414."""

    def _added(self, place: int, x_RD: Tensor) -> Tensor:
        return _norm(getattr(self, GLM4_NORMS[place]), x_RD)


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    GlmDecoderLayer: DecodingGlmLayer,
    Glm4DecoderLayer: DecodingGlm4Layer,
}
"""transformers' class → ours."""


def use_decoding_layers(model: nn.Module) -> int:
    """Let the layers of a model whose products are all native call them directly for a few tokens.

    Args:
        model: with its products, gates and norms in place; mutated: layers change their class.

    Returns:
        How many layers do so.
    """
    kinds = {**LAYERS, **{ours: ours for ours in LAYERS.values()}}
    for layer in [module for module in model.modules() if type(module) in kinds]:
        calls = _calls_of(layer)
        if calls is None:
            _CALLS.pop(layer, None)
        else:
            layer.__class__ = kinds[type(layer)]
            _CALLS[layer] = calls
    return sum(module in _CALLS for module in model.modules())


def _calls_of(layer: nn.Module) -> _Calls | None:
    """Return what a layer is to call; None: something in it is not native."""
    modules = dict(layer.named_modules())
    inputs = [_layer_of_codes(modules.get(name)) for name in INPUTS]
    outputs = [_layer_of_codes(modules.get(name)) for name in OUTPUTS]
    layers = [each for each in (*inputs, *outputs) if each is not None]
    found = [each.product.multiply for each in layers if each.product is not None]
    norms = [module for name, module in modules.items() if name.endswith("layernorm")]
    if len(found) < len(INPUTS) + len(OUTPUTS) or type(modules["mlp"]) not in GATED.values():
        return None
    first, (out, gated, down) = found[0], found[len(INPUTS) :]
    are_packed = all(isinstance(each, PackedProduct) for each in (out, gated, down))
    if (
        not isinstance(first, FusedPart)
        or not are_packed
        or not all(type(n) in NORMS.values() for n in norms)
    ):
        return None
    biases = [each.bias for each in layers[: len(INPUTS)] if each.bias is not None]
    if len(biases) not in (0, len(INPUTS)) or any(each.bias is not None for each in layers[len(INPUTS) :]):
        return None
    owners = [
        (modules[name.rpartition(".")[0]]._modules, name.rpartition(".")[2], module)
        for name, module in modules.items()
        if name
    ]
    return _Calls(
        owners=tuple(owners),
        layers=tuple((each, cast(Product, each.product)) for each in layers),
        qkv=first.fused.whole,
        bias=torch.cat([each.detach() for each in biases]) if biases else None,
        out=cast(PackedProduct, out),
        gated=cast(PackedProduct, gated),
        down=cast(PackedProduct, down),
    )


def _layer_of_codes(module: nn.Module | None) -> QuantizedLinear | None:
    return module if type(module) is QuantizedLinear and module.product is not None else None


def _norm(norm: Any, x_RD: Tensor) -> Tensor:
    weight = norm.weight
    return normed(x_RD, weight, norm.variance_epsilon) if weight.dtype == x_RD.dtype else norm(x_RD)


def _takes(hidden: Tensor, angles: tuple[Tensor, Tensor] | None) -> bool:
    return (
        hidden.dtype == torch.bfloat16
        and hidden.device.type == "cpu"
        and 0 < hidden.shape[0] * hidden.shape[1] <= MOST_ROWS
        and angles is not None
        and all(each.dtype == hidden.dtype for each in angles)
        and angles[0].stride() == angles[1].stride()
        # The compiled functions are no operations of PyTorch, which it could differentiate, cast or trace.
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
