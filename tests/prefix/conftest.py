"""Small bases and prefixes for the prefix tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM

from glmtune.prefix.encoder import PrefixEncoder, prefix_shape


def tiny_config(**changes: object) -> GlmConfig:
    """A base small enough for every test: 2 layers, 4 heads over 2 key/value heads of 8 channels."""
    settings: dict[str, object] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": True,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    return GlmConfig(**{**settings, **changes})


def make_base(attention: str = "sdpa", *, seed: int = 0, **changes: object) -> GlmForCausalLM:
    """A randomly initialised base in evaluation mode, equal for equal seeds."""
    torch.manual_seed(seed)
    config = tiny_config(**changes)
    config._attn_implementation = attention
    model = GlmForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2 + (1.0 if weight.dim() == 1 else 0.0))
    return model.eval()


def make_prefix(
    model: GlmForCausalLM,
    *,
    length: int = 5,
    projection: bool = False,
    dropout: float = 0.0,
    seed: int = 1,
    gate: bool = False,
) -> PrefixEncoder:
    """A randomly initialised prefix for a base; its gates, if it has some, are those of a new one: zero."""
    torch.manual_seed(seed)
    hidden = model.config.hidden_size if projection else None
    return PrefixEncoder(
        prefix_shape(model.config),
        pre_seq_len=length,
        hidden_size=hidden,
        num_gates=model.config.num_attention_heads if gate else None,
        dropout=dropout,
    )


def make_opened(model: GlmForCausalLM, *, seed: int = 1, **changes: Any) -> PrefixEncoder:
    """A gated prefix whose gates are open, each by another amount and some to the other side."""
    encoder = make_prefix(model, gate=True, seed=seed, **changes)
    assert encoder.gate is not None
    with torch.no_grad():
        encoder.gate.weight.copy_(torch.randn_like(encoder.gate.weight))
    return encoder


def random_ids(batch: int, length: int, *, seed: int = 2) -> Tensor:
    """Token ids without pad and end."""
    return torch.randint(2, 50, (batch, length), generator=torch.Generator().manual_seed(seed))
