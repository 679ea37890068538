"""The encoder by itself: layout, dropout, and when its result is remembered."""

from __future__ import annotations

import pytest
import torch

from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.encoder import LayerStates, PrefixEncoder, PrefixShape, prefix_shape
from tests.prefix.conftest import make_base, make_prefix, random_ids, tiny_config

SHAPE = PrefixShape(num_layers=3, num_kv_heads=2, head_dim=4)


def _count_projections(encoder: PrefixEncoder) -> list[int]:
    calls: list[int] = []
    encoder.trans[2].register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_geometry_comes_from_the_config() -> None:
    assert prefix_shape(tiny_config()) == PrefixShape(2, 2, 8)
    assert prefix_shape(tiny_config()).kv_width == 2 * 2 * 2 * 8


def test_a_row_holds_layer_then_key_value_then_head_then_channel() -> None:
    encoder = PrefixEncoder(SHAPE, pre_seq_len=5)
    with torch.no_grad():
        encoder.embedding.weight.copy_(torch.arange(5 * 48).view(5, 48))
    states = encoder()
    assert states.shape == (3, 2, 5, 2, 4)
    assert states[1, 0, 2, 1, 3] == 2 * 48 + 1 * 16 + 0 * 8 + 1 * 4 + 3
    assert states[2, 1, 4, 0, 1] == 4 * 48 + 2 * 16 + 1 * 8 + 0 * 4 + 1
    keys, values = encoder.eval().layer_states(2, torch.bfloat16)[1]
    assert keys.shape == values.shape == (2, 2, 5, 4)
    assert keys.dtype == torch.bfloat16
    assert torch.equal(values[1, 1, 3].float(), states[1, 1, 3, 1].bfloat16().float())


def test_projection_widths() -> None:
    later = PrefixEncoder(SHAPE, pre_seq_len=5, hidden_size=7)
    assert {name: tuple(weight.shape) for name, weight in later.named_parameters()} == {
        "embedding.weight": (5, 48),
        "trans.0.weight": (7, 48),
        "trans.0.bias": (7,),
        "trans.2.weight": (48, 7),
        "trans.2.bias": (48,),
    }
    first = PrefixEncoder(SHAPE, pre_seq_len=5, hidden_size=7, embedding_width=7)
    assert first.embedding.weight.shape == (5, 7)
    assert first.trans[0].weight.shape == (7, 7)
    assert first().shape == (3, 2, 5, 2, 4)


def test_dropout_falls_on_each_row_of_a_training_batch_only() -> None:
    torch.manual_seed(0)
    encoder = PrefixEncoder(SHAPE, pre_seq_len=200, dropout=0.1)
    plain = encoder.eval().layer_states(1, torch.float32)
    dropped = encoder.train().layer_states(4, torch.float32)
    kept = torch.stack([torch.stack(pair) for pair in dropped])
    zero = (kept == 0).float()
    assert 0.08 < float(zero.mean()) < 0.12
    assert not torch.equal(zero[:, :, 0], zero[:, :, 1])
    whole = torch.stack([torch.stack(pair) for pair in plain]).expand_as(kept)
    torch.testing.assert_close(kept[zero == 0], (whole / 0.9)[zero == 0])
    encoder.dropout = 0.0
    assert _equal(encoder.layer_states(1, torch.float32), plain)


def _equal(one: LayerStates, other: LayerStates) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@torch.no_grad()
def test_generating_evaluates_the_projection_once() -> None:
    model = make_base()
    encoder = make_prefix(model, projection=True)
    attach_prefix(model, encoder)
    calls = _count_projections(encoder)
    model.generate(random_ids(2, 5), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert len(calls) == 1
    model.generate(random_ids(3, 4), max_new_tokens=4, min_new_tokens=4, num_beams=2)
    assert len(calls) == 1  # another batch size changes nothing


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "replaced", "loaded", "mode"])
def test_what_is_remembered_is_forgotten_when_it_changes(change: str) -> None:
    encoder = PrefixEncoder(SHAPE, pre_seq_len=5, hidden_size=7).eval()
    calls = _count_projections(encoder)
    before = encoder.layer_states(2, torch.float32)
    assert _equal(encoder.layer_states(2, torch.float32), before)
    assert len(calls) == 1
    if change == "in place":
        encoder.trans[2].bias.add_(1)
    elif change == "replaced":
        encoder.trans[2].bias.data = encoder.trans[2].bias.data + 1
    elif change == "loaded":
        encoder.load_state_dict({name: weight + 1 for name, weight in encoder.state_dict().items()})
    else:
        encoder.trans[2].bias.data.add_(1)  # invisible to version counters, as some optimizers write
        encoder.train()
        encoder.eval()
    assert not _equal(encoder.layer_states(2, torch.float32), before)
    assert len(calls) == 2


def test_gradients_are_never_cut_by_what_is_remembered() -> None:
    encoder = PrefixEncoder(SHAPE, pre_seq_len=5, hidden_size=7).eval()
    with torch.inference_mode():
        encoder.layer_states(2, torch.float32)
    keys, values = encoder.layer_states(2, torch.float32)[0]
    (keys.sum() + values.sum()).backward()
    assert encoder.embedding.weight.grad is not None


def test_weights_made_under_inference_mode_are_not_remembered() -> None:
    with torch.inference_mode():
        encoder = PrefixEncoder(SHAPE, pre_seq_len=5, hidden_size=7).eval()
        before = encoder.layer_states(1, torch.float32)
        encoder.trans[2].bias.add_(1)
        assert not _equal(encoder.layer_states(1, torch.float32), before)


def test_printing_shows_length_and_geometry() -> None:
    text = repr(PrefixEncoder(SHAPE, pre_seq_len=5))
    assert "pre_seq_len=5, 3 layers x 2 key/value heads x head_dim 4, dropout=0.1" in text
