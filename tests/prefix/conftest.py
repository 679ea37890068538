"""Small bases and prefixes for the prefix tests, and the golden prefix-tuning cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM

from glmtune.prefix.encoder import PrefixEncoder, prefix_shape


@dataclass(frozen=True)
class Golden:
    """The prefix-tuning cases of one released architecture."""

    folder: Path
    tensors: dict[str, Tensor]
    values: dict[str, dict[str, object]]

    def case(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one case by their short names."""
        start = name + "."
        return {key[len(start) :]: tensor for key, tensor in self.tensors.items() if key.startswith(start)}

    def inputs(self, name: str) -> dict[str, Tensor]:
        """Return what the model is given in one case."""
        keys = ("input_ids", "attention_mask", "position_ids", "labels")
        return {key: tensor for key, tensor in self.case(name).items() if key in keys}


@pytest.fixture(scope="session")
def golden(oracles: Path) -> Callable[[str], Golden]:
    """Load the cases of an architecture by its directory name."""

    def load(architecture: str) -> Golden:
        folder = oracles / architecture
        described = json.loads((folder / "ptuning.json").read_text(encoding="utf-8"))["cases"]
        values = {name: case.get("values", {}) for name, case in described.items()}
        return Golden(folder, load_file(folder / "ptuning.safetensors"), values)

    return load


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
    model: GlmForCausalLM, *, length: int = 5, projection: bool = False, dropout: float = 0.0, seed: int = 1
) -> PrefixEncoder:
    """A randomly initialised prefix for a base."""
    torch.manual_seed(seed)
    hidden = model.config.hidden_size if projection else None
    return PrefixEncoder(prefix_shape(model.config), pre_seq_len=length, hidden_size=hidden, dropout=dropout)


def random_ids(batch: int, length: int, *, seed: int = 2) -> Tensor:
    """Token ids without pad and end."""
    return torch.randint(2, 50, (batch, length), generator=torch.Generator().manual_seed(seed))
