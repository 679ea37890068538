"""Models of random weights or codes in memory, on any device: the shape of ChatGLM2-6B, or less of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from glmtune.models.checkpoints.config import native_config
from glmtune.models.later import OfficialGlmForCausalLM
from glmtune.models.releases.families import Family
from glmtune.quantization.layers.apply import replace_layers
from glmtune.quantization.layers.linear import QuantizedLinear
from glmtune.quantization.layers.plan import plan_layout

TILE = 2**20
"""Random numbers drawn once and repeated: what is measured does not depend on the values."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a ChatGLM2; the defaults are those of ChatGLM2-6B."""

    layers: int = 28
    hidden: int = 4096
    ffn: int = 13696
    vocab: int = 65024
    heads: int = 32
    positions: int = 32768

    @property
    def official(self) -> dict[str, Any]:
        """The values of config.json under the official names."""
        return {
            "model_type": "chatglm",
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn,
            "kv_channels": self.hidden // self.heads,
            "num_attention_heads": self.heads,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "padded_vocab_size": self.vocab,
            "seq_length": self.positions,
            "layernorm_epsilon": 1e-5,
            "add_qkv_bias": True,
            "torch_dtype": "bfloat16",
        }


def random_model(
    shape: Shape,
    method: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> OfficialGlmForCausalLM:
    """Make a model with random weights or random codes, each allocated once, on its device.

    Args:
        shape: its sizes.
        method: of `glmtune.quantization.arithmetic.methods.METHODS`; None: floating point weights.
        device: where.
        dtype: floating type.
    """
    config = native_config(shape.official, Family.CHATGLM2)
    config.dtype = dtype
    with torch.device("meta"):
        model = OfficialGlmForCausalLM(config)
        if method is not None:
            layout = plan_layout(config, method)
            layout.put_into(model.config)
            replace_layers(model, layout)
    model._apply(
        lambda t: torch.empty_like(t, device=device, dtype=dtype if t.is_floating_point() else t.dtype)
    )
    model.rebuild_rotary()
    fill(model)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Write random values of the usual size into every weight and code of a model."""
    device = next(model.parameters()).device
    normal = torch.randn(TILE, device=device).mul_(0.02)
    codes = torch.randint(-127, 127, (TILE,), dtype=torch.int8, device=device)
    for parameter in model.parameters():
        tile = normal.to(parameter.dtype) if parameter.is_floating_point() else codes
        for piece in parameter.view(-1).split(TILE):
            piece.copy_(tile[: len(piece)])
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.weight_scale.fill_(0.004)
