"""A model split by layers over two devices answers a mixed batch as the whole one; nothing of two devices meets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device

from glmtune.inference.engine.engine import Engine
from glmtune.inference.load_engine import load_engine
from glmtune.inference.settings import EngineSettings
from glmtune.loading import load_base
from glmtune.models import placement
from glmtune.models.placement import dispatch, layer_devices
from glmtune.models.settings import ModelSettings
from tests.inference.engine.requests import add_adapters, engine_of, finish, load, mixed_requests


def split(model: Any, second: str) -> Any:
    """Put every other layer on a second device, with hooks."""
    layers = [name for name, _ in model.named_modules() if placement.LAYER.fullmatch(name)]
    places = {name: torch.device(second if number % 2 else "cpu:0") for number, name in enumerate(layers)}
    _, others = placement._parts(model)
    places |= {name: torch.device("cpu:0") for name in others}
    for name in layers:
        model.get_submodule(name).to(places[name])
    return dispatch(model, places)


def answers(engine: Engine, requests: list[Any]) -> list[tuple[int, ...]]:
    generations = []
    for request in requests:
        generations.append(engine.submit(request))
        engine.step()
    finish(engine)
    return [generation.result().token_ids for generation in generations]


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "glm4"])
@pytest.mark.parametrize("kv_cache", ["plain", "int8"])
def test_a_mixed_batch_equals_that_of_the_whole_model(name: str, kv_cache: str, tmp_path: Path) -> None:
    whole, parted = load(name), split(load(name), "cpu:1")
    settings: dict[str, Any] = {"batch_size": 7, "piece_tokens": 5, "read_tokens": 24, "kv_cache": kv_cache}
    assert {str(device) for device in layer_devices(parted)} == {"cpu:0", "cpu:1"}
    expected = answers(engine_of(whole, tmp_path / "whole", **settings), mixed_requests(whole))
    found = answers(engine_of(parted, tmp_path / "parted", **settings), mixed_requests(parted))
    assert found == expected
    assert len(set(expected)) > 6


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "glm4"])
@pytest.mark.parametrize("kv_cache", ["plain", "int8"])
def test_every_layer_computes_on_its_device(
    name: str, kv_cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch refuses to compute with tensors of two devices; the second is `meta`, whose numbers are none."""
    moved: list[str] = []

    def send(value: Any, device: torch.device, skip_keys: Any = ()) -> Any:
        if device.type == "cpu":
            return _without_meta(value, skip_keys)
        moved.append(str(device))
        return send_to_device(value, device, skip_keys=skip_keys)

    model = load(name)
    add_adapters(engine_of(model), model, tmp_path)  # written while there are numbers
    monkeypatch.setattr(placement, "send_to_device", send)
    model = split(model, "meta")
    engine = engine_of(model, piece_tokens=5, read_tokens=24, kv_cache=kv_cache)
    for prefix in ("short", "long", "gated", "gated-b"):
        engine.add_adapter(prefix, tmp_path / prefix)
    requests = [request for request in mixed_requests(model) if "lora" not in request.adapter]
    assert all(answers(engine, requests))
    places = [keys.device.type for keys, _ in engine._adapters["short"].states.layers]  # type: ignore[union-attr]
    assert places == [device.type for device in layer_devices(model)]
    assert "meta" in places
    assert moved


def _without_meta(value: Any, skipped: Any) -> Any:
    """Bring back what has no numbers as zeros."""
    if isinstance(value, torch.Tensor):
        return torch.zeros(value.shape, dtype=value.dtype) if value.device.type == "meta" else value
    if isinstance(value, dict):
        return {key: each if key in skipped else _without_meta(each, skipped) for key, each in value.items()}
    return type(value)(_without_meta(each, skipped) for each in value) if isinstance(value, tuple) else value


def test_settings_split_a_model(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def loaded(source: str, **options: Any) -> Any:
        asked.update(options)
        options = {name: value for name, value in options.items() if name not in ("device_map", "num_gpus")}
        return split(load_base(source, **options, device="cpu"), "cpu:1")

    monkeypatch.setattr("glmtune.inference.load_engine.load_base", loaded)
    chat = load_engine(ModelSettings(source=str(tiny_base), num_gpus=2), settings=EngineSettings())
    assert (asked["device_map"], asked["num_gpus"], "device" in asked) == ("auto", 2, False)
    engine: Any = chat.engine
    assert len(set(engine._model.layer_devices)) == 2
