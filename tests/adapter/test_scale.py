"""The scale of a LoRA: W + scale * (alpha / rank) * B * A."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from glmtune.adapter import load_adapter, set_scale
from glmtune.errors import ConfigError
from glmtune.loading import load_model
from glmtune.models.load import load_official
from tests.inference.engine.requests import load, write_lora
from tests.inference.engine.test_strengths import add_by_hand

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
def test_a_scale_is_that_of_the_product(scale: float, tmp_path: Path) -> None:
    model = load("chatglm2")
    base = model(IDS).logits
    write_lora(model, tmp_path / "lora", seed=3)
    scaled = load_adapter(tmp_path / "lora", model, scale=scale)
    found = scaled(IDS).logits
    torch.testing.assert_close(found, add_by_hand(load("chatglm2"), tmp_path / "lora", scale)(IDS).logits)
    assert torch.equal(found, base) == (scale == 0)
    set_scale(scaled, 3.0)
    set_scale(scaled, scale)
    assert torch.equal(scaled(IDS).logits, found), "a scale is of the adapter's own, not of the one before"


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_over_codes_that_are_made_on_loading(quantization: str, tiny_base: Path, tmp_path: Path) -> None:
    write_lora(load_official(tiny_base), tmp_path / "lora", seed=3)
    options: dict[str, Any] = {"quantization": quantization, "dtype": "float32", "device": "cpu"}
    base = load_model(tiny_base, **options)(IDS).logits
    found = {
        scale: load_model(tiny_base, adapter=tmp_path / "lora", adapter_scale=scale, **options)(IDS).logits
        for scale in (0.0, 0.5, 1.0)
    }
    assert torch.equal(found[0.0], base)
    assert not torch.allclose(found[0.5], found[1.0])
    assert not torch.allclose(found[0.5], base)


def test_settings_that_mean_nothing_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    write_lora(load_official(tiny_base), tmp_path / "lora", seed=3)
    with pytest.raises(ConfigError, match=r"`adapter_scale` is -1, but it must be a number from 0"):
        load_model(tiny_base, adapter=tmp_path / "lora", adapter_scale=-1)
    with pytest.raises(ConfigError, match=r"`adapter_scale` is 0.5, but no adapter is given.*`adapter=RUN`"):
        load_model(tiny_base, adapter_scale=0.5)
    with pytest.raises(ConfigError, match=r"`prefix_strength` is 2, but no prefix is given.*`prefix=RUN`"):
        load_model(tiny_base, adapter=tmp_path / "lora", prefix_strength=2)
    with pytest.raises(ConfigError, match=r"`prefix_strength` is 'half', but it must be a number"):
        load_model(tiny_base, prefix=tmp_path, prefix_strength="half")  # pyright: ignore[reportArgumentType]
