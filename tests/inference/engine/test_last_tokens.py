"""The last layer is computed for the last token of each row: what comes of it is the same."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch

from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.reading import Before
from glmtune.loading import load_tuned
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.checkpoint import load_prefix
from tests.inference.engine.cases import shared_prompts
from tests.inference.engine.requests import load, write_lora, write_prefix

NAMES = ["chatglm2", "chatglm2-32k", "chatglm3", "glm4", "per-head"]


def assert_same_reading(model: EngineModel, prompts: list[list[int]], before: list[Before]) -> None:
    """Read with the last layer for every token and for the last ones, and compare all that comes of it."""
    every = model.read(prompts, before, keep=True, every=True)
    last = model.read(prompts, before, keep=True)
    assert every.hidden_BSD.shape[1] == max(map(len, prompts))
    assert last.hidden_BSD.shape[1] == 1
    torch.testing.assert_close(last.last_hidden_BD, every.last_hidden_BD, rtol=1e-5, atol=1e-5)
    assert last.positions.tolist() == every.positions.tolist()
    assert len(last.layers) == len(every.layers) == model.config.num_hidden_layers
    for mine, other in zip(last.layers, every.layers, strict=True):
        assert torch.equal(mine[0], other[0])
        assert torch.equal(mine[1], other[1])
    kept = model.read(prompts, before, keep=False)
    assert torch.equal(kept.last_hidden_BD, last.last_hidden_BD)
    assert kept.layers == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["base", "prefix", "gated", "lora"])
def test_it_is_the_same_alone_and_behind_what_was_read(name: str, what: str, tmp_path: Path) -> None:
    base = load(name)
    if what == "lora":
        from glmtune.adapter import load_adapter

        base = load_adapter(write_lora(base, tmp_path / "lora", seed=3), base)
    elif what != "base":
        folder = write_prefix(base, tmp_path / "prefix", seed=1, length=5, gate=what == "gated")
        attach_prefix(base, load_prefix(folder, base))
    model = EngineModel(base)
    prompts = shared_prompts(model.config)
    assert_same_reading(model, prompts, [Before()])
    first = model.read([prompts[0]], [Before()], keep=True).layers
    assert_same_reading(model, prompts, [Before(tuple(first))])
    # Each row behind its own tokens, of unlike number.
    rows = [Before(tuple(model.read([prompts[place]], [Before()], keep=True).layers)) for place in (1, 2, 3)]
    assert_same_reading(model, prompts[4:7], rows)


def test_a_single_token_and_twins(tmp_path: Path) -> None:
    model = EngineModel(load("chatglm2"))
    assert model.read([[5]], [Before()], keep=False).hidden_BSD.shape[:2] == (1, 1)
    assert_same_reading(model, [[5, 6], [7]], [Before()])
    assert_same_reading(model, [[5, 6], [5, 6]], [Before()])


def test_the_layer_is_left_as_it_was() -> None:
    base: Any = load("chatglm2")
    layer = base.model.layers[-1]
    model = EngineModel(base)
    model.read([[5, 6, 7]], [Before()], keep=False)
    assert "forward" not in layer.__dict__
    hooked = MethodType(type(layer).forward, layer)  # as accelerate's hooks put one there
    layer.forward = hooked
    model.read([[5, 6, 7]], [Before()], keep=False)
    assert layer.forward is hooked
    layer.forward = None
    with pytest.raises(TypeError, match="not callable"):
        model.read([[5, 6, 7]], [Before()], keep=False)
    assert layer.__dict__["forward"] is None


def test_over_codes(oracles: Path) -> None:
    tuned = load_tuned(
        oracles / "v2/checkpoint_safetensors", quantization="int4", dtype="float32", device="cpu"
    )
    model = EngineModel(tuned)
    assert_same_reading(model, shared_prompts(model.config), [Before()])


def test_chatglm_6b_computes_every_token() -> None:
    model = EngineModel(load("chatglm"))
    prompts = shared_prompts(model.config)
    assert model.read(prompts, [Before()], keep=False).hidden_BSD.shape[1] == max(map(len, prompts))
