"""What a new prefix starts from."""

from __future__ import annotations

import pytest
import torch
from transformers import BatchEncoding

from glmtune.errors import ConfigError
from glmtune.prefix.attach import attach_prefix, prefix_of
from glmtune.prefix.init import build_prefix_encoder, text_rows
from glmtune.prefix.settings import PrefixSettings
from tests.prefix.conftest import make_base, make_prefix, random_ids
from tests.prefix.direct import direct_logits

TEXT = [7, 9, 20, 33]


class Tokenizer:
    """Gives the same four tokens for every text."""

    def __call__(self, text: str, return_tensors: str) -> BatchEncoding:
        assert text == "Be brief."
        assert return_tensors == "pt"
        return BatchEncoding({"input_ids": torch.tensor([TEXT])})


def _text(length: int) -> PrefixSettings:
    return PrefixSettings(pre_seq_len=length, init="text", init_text="Be brief.")


def test_random_is_the_official_initialisation() -> None:
    torch.manual_seed(3)
    encoder = build_prefix_encoder(make_base(), PrefixSettings(pre_seq_len=300, dropout=0.2))
    weight = encoder.embedding.weight
    assert weight.shape == (300, 64)
    assert abs(float(weight.detach().mean())) < 0.02
    assert abs(float(weight.detach().std()) - 1) < 0.02
    assert encoder.dropout == 0.2
    projected = build_prefix_encoder(make_base(), PrefixSettings(pre_seq_len=4, prefix_projection=True))
    assert projected.trans[0].weight.shape == (32, 64)
    assert float(projected.trans[0].weight.detach().abs().max()) <= 64**-0.5


def test_random_follows_the_seed() -> None:
    model, settings = make_base(), PrefixSettings(pre_seq_len=4, prefix_projection=True)
    torch.manual_seed(5)
    one = build_prefix_encoder(model, settings)()
    torch.manual_seed(5)
    assert torch.equal(build_prefix_encoder(model, settings)(), one)


@pytest.mark.parametrize("projection", [False, True])
def test_zero_takes_attention_but_adds_nothing_and_can_learn(projection: bool) -> None:
    model = make_base("eager")
    settings = PrefixSettings(pre_seq_len=4, prefix_projection=projection, init="zero", dropout=0.0)
    encoder = build_prefix_encoder(model, settings)
    assert not encoder().any()
    bare = model(random_ids(1, 6)).logits
    attach_prefix(model, encoder)
    output = model(random_ids(1, 6), output_attentions=True)
    assert bool((output.attentions[0][..., :4] > 0).all())
    assert not torch.allclose(output.logits, bare)  # not the same as no prefix
    output.logits.square().mean().backward()
    last = encoder.trans[2] if projection else encoder.embedding
    assert last.weight.grad is not None
    assert bool(last.weight.grad.any())


def test_text_gives_unrotated_keys_and_values_at_their_own_positions() -> None:
    model = make_base()
    recorded = build_prefix_encoder(model, _text(4), Tokenizer())().detach()  # [layers, 2, 4, heads, size]
    hidden = model.model.embed_tokens.weight[TEXT].detach()
    first = model.model.layers[0]
    normed = first.input_layernorm(hidden)
    for part, projection in enumerate((first.self_attn.k_proj, first.self_attn.v_proj)):
        torch.testing.assert_close(recorded[0, part].flatten(1), projection(normed).detach())
    # The second layer saw the tokens at positions 0, 1, 2, 3: its input is the first layer's output.
    hidden = model.model(torch.tensor([TEXT]), output_hidden_states=True).hidden_states[1][0]
    second = model.model.layers[1]
    values = second.self_attn.v_proj(second.input_layernorm(hidden)).detach()
    torch.testing.assert_close(recorded[1, 1].flatten(1), values)


@torch.no_grad()
def test_text_is_cut_or_repeated_to_the_length() -> None:
    model = make_base()
    whole = build_prefix_encoder(model, _text(4), Tokenizer()).embedding.weight
    cut = build_prefix_encoder(model, _text(3), Tokenizer()).embedding.weight
    torch.testing.assert_close(cut, whole[:3])
    tiled = build_prefix_encoder(model, _text(10), Tokenizer()).embedding.weight
    torch.testing.assert_close(tiled, whole[[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]])
    encoder = build_prefix_encoder(model, _text(10), Tokenizer()).eval()
    attach_prefix(model, encoder)
    ids = random_ids(1, 5)
    torch.testing.assert_close(model(ids).logits[0], direct_logits(model, ids[0], encoder()))


@torch.no_grad()
def test_text_ignores_an_attached_prefix_and_leaves_the_model_as_it_was() -> None:
    model = make_base().train()
    expected = text_rows(model, torch.tensor([TEXT]))
    encoder = make_prefix(model)
    attach_prefix(model, encoder)
    assert torch.equal(text_rows(model, torch.tensor([TEXT])), expected)
    assert prefix_of(model) is encoder
    assert model.training
    assert encoder.training
    assert not model.model.layers[0].self_attn.k_proj._forward_hooks


def test_text_in_half_precision_is_stored_in_float32() -> None:
    model = make_base().to(torch.bfloat16)
    encoder = build_prefix_encoder(model, _text(4), Tokenizer())
    assert encoder.embedding.weight.dtype == torch.float32
    assert encoder.embedding.weight.requires_grad


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"`prefix.init` is `text`.*tokenizer.*load_tokenizer.*init=random"):
        build_prefix_encoder(make_base(), _text(4))
