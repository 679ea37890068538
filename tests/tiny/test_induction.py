"""A fresh glm-tiny copies what it reads before it has learnt anything."""

from __future__ import annotations

import torch
from transformers import GlmConfig, GlmForCausalLM

from glmtune.tiny.induction import can_copy, teach_copying, teach_copying_where_it_fits
from glmtune.training.adapt import fresh_model


def copied_share(model: GlmForCausalLM) -> float:
    """Repeat random strings; the share of the second copy that is the most probable next token each time."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(300, 4000, (20, 12), generator=generator)
    ids = torch.cat([text, torch.full((20, 1), 100), text], dim=1)
    with torch.no_grad():
        predicted = model(input_ids=ids).logits[:, 13:-1].argmax(-1)
    return float((predicted == ids[:, 14:]).float().mean())


def fresh_tiny() -> GlmForCausalLM:
    return fresh_model("glm-tiny", device="cpu", family=None, initialize=teach_copying_where_it_fits)


def test_a_fresh_model_copies() -> None:
    torch.manual_seed(0)
    assert copied_share(fresh_tiny()) > 0.9


def test_the_copy_comes_from_the_two_layers() -> None:
    model = fresh_tiny()
    for layer in model.model.layers[2:]:
        assert not layer.self_attn.o_proj.weight.any()
        assert not layer.mlp.down_proj.weight.any()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    assert copied_share(model) < 0.1


def test_the_basis_follows_the_seed() -> None:
    config = GlmConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        attention_bias=True,
        pad_token_id=0,
    )
    first, again, other = GlmForCausalLM(config), GlmForCausalLM(config), GlmForCausalLM(config)
    for model, seed in ((first, 0), (again, 0), (other, 1)):
        teach_copying(model, seed=seed)
    weights = [model.model.layers[1].self_attn.o_proj.weight for model in (first, again, other)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_shapes_without_room_are_left_alone() -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    assert can_copy(GlmConfig(**shape, num_key_value_heads=2, attention_bias=True))
    assert not can_copy(GlmConfig(**shape, num_key_value_heads=4, attention_bias=True))
    assert not can_copy(GlmConfig(**shape, num_key_value_heads=2, attention_bias=False))
    assert not can_copy(
        GlmConfig(**{**shape, "num_hidden_layers": 1}, num_key_value_heads=2, attention_bias=True)
    )
