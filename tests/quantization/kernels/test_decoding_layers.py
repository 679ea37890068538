"""Layers that call their products directly give what their modules give, and step back when these change."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.glm import modeling_glm
from transformers.models.glm4 import modeling_glm4

from glmtune.quantization.arithmetic.methods import METHODS
from glmtune.quantization.kernels import decoding_layers
from glmtune.quantization.kernels.decoding_layers import LAYERS, use_decoding_layers
from glmtune.quantization.kernels.dispatch import prepare_for_inference
from glmtune.quantization.layers.linear import QuantizedLinear

pytestmark = pytest.mark.usefixtures("compiled")

KINDS: dict[str, tuple[Any, Any]] = {
    "glm": (modeling_glm.GlmForCausalLM, modeling_glm.GlmConfig),
    "glm4": (modeling_glm4.Glm4ForCausalLM, modeling_glm4.Glm4Config),
}


def model_of(kind: str, *, bias: bool = True) -> Any:
    """Return a small INT4 model without products."""
    model_class, config_class = KINDS[kind]
    config = config_class(
        vocab_size=300, hidden_size=256, intermediate_size=192, num_hidden_layers=3, head_dim=64,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=bias, pad_token_id=0,
        max_position_embeddings=256, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(5)
    model = model_class(config).bfloat16().eval()
    method = METHODS["int4"]
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            sizes = layer.in_features, layer.out_features
            made = QuantizedLinear(*sizes, layout=method.layout("int4"), bias=layer.bias)
            made.put(method.quantize(layer.weight.detach().float()))
            model.model.layers.set_submodule(name, made)
            if made.bias is not None:
                nn.init.normal_(made.bias)
    return model


@pytest.fixture(params=[(kind, bias) for kind in KINDS for bias in (True, False)], ids=str)
def prepared(request: pytest.FixtureRequest) -> Any:
    """Return such a model with its products."""
    model = model_of(request.param[0], bias=request.param[1])
    prepare_for_inference(model)
    assert all(type(layer) in LAYERS.values() for layer in model.model.layers)
    return model


@torch.inference_mode()
def passes(model: Any) -> list[Tensor]:
    """Logits of a prompt and of steps behind it, of one token, of several, of two rows."""
    found: list[Tensor] = []
    for rows in (1, 2):
        cache = DynamicCache(config=model.config)
        ids = torch.arange(rows * 14).view(rows, 14) * 7 % 290 + 5
        for part in (ids[:, :10], ids[:, 10:11], ids[:, 11:14]):
            found.append(model(input_ids=part, cache=cache, use_cache=True).logits)
    return found


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the norms that layers call by themselves: two or four a layer."""
    counted: list[int] = []
    original = decoding_layers.normed
    monkeypatch.setattr(decoding_layers, "normed", lambda *a: (counted.append(1), original(*a))[1])
    return counted


def test_the_same_bits_as_by_modules(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = calls(monkeypatch)
    found = passes(prepared)
    assert len(counted) >= 4 * 2 * 3
    counted.clear()
    monkeypatch.setattr(decoding_layers, "MOST_ROWS", 0)
    expected = passes(prepared)
    assert not counted
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("change", ["hook", "pre-hook", "product", "norm", "forward", "cast"])
def test_a_layer_that_changed_calls_its_modules(
    prepared: Any, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    counted, seen = calls(monkeypatch), []
    passes(prepared)
    before = len(counted)
    layer = prepared.model.layers[1]
    if change == "hook":
        layer.self_attn.o_proj.register_forward_hook(lambda *_: seen.append(1))
    elif change == "pre-hook":
        layer.mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    elif change == "product":
        layer.mlp.down_proj.use(None)
    elif change == "norm":
        layer.input_layernorm = copy.deepcopy(layer.input_layernorm)
    elif change == "forward":
        original = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, **k: (seen.append(1), original(*a, **k))[1]
    else:
        layer.bfloat16()
    counted.clear()
    passes(prepared)
    assert len(counted) == before * 2 // 3
    assert bool(seen) == (change in ("hook", "pre-hook", "forward"))


def test_adapters_are_heard(prepared: Any) -> None:
    targets = ["q_proj", "down_proj"]
    tuned = get_peft_model(prepared, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    tuned.eval()
    with_adapter = passes(tuned.base_model.model)
    with tuned.disable_adapter():
        without = passes(tuned.base_model.model)
    assert not torch.equal(with_adapter[1], without[1])
    assert [len(without), len(with_adapter)] == [6, 6]


def test_copies_do_not_call_what_belongs_to_another(prepared: Any) -> None:
    expected = passes(prepared)
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        layer = twin.model.layers[0]
        assert layer not in decoding_layers._CALLS
        for found, other in zip(passes(twin), expected, strict=True):
            assert torch.allclose(found.float(), other.float(), atol=0.1 * float(other.float().abs().max()))
        prepare_for_inference(twin)
        assert layer in decoding_layers._CALLS
        for found, other in zip(passes(twin), expected, strict=True):
            assert torch.equal(found, other)


def test_layers_that_are_not_all_codes_stay_as_they_are() -> None:
    model = model_of("glm")
    layer = model.model.layers[0]
    layer.mlp.down_proj = nn.Linear(192, 256, bias=False).bfloat16()
    prepare_for_inference(model)
    assert type(layer) is modeling_glm.GlmDecoderLayer
    assert use_decoding_layers(model) == 2
    assert passes(model)[1].isfinite().all()
