"""A rule in a prefix' file and beside an adapter: there and back, older files, damage, other models."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glmtune.adapter import adapter_sha256, load_adapter
from glmtune.errors import CheckpointError, ShapeError
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.checkpoint import describe_prefix, export_official_prefix, load_prefix, save_prefix
from glmtune.storage.manifest import write_manifest
from glmtune.switch.files import SWITCH_FILE, read_switch, save_switch
from glmtune.switch.model import attach_switch, detach_switch, switch_of
from glmtune.switch.rule import Switch
from glmtune.tuned_files import PREFIX_FILE
from tests.inference.engine.requests import load, write_lora
from tests.switch.cases import FACTS, write_tuned


@pytest.fixture(scope="module")
def model():
    return load("chatglm2")


@pytest.fixture
def switch(model):
    return Switch(
        torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1)), -0.25, FACTS
    )


def assert_is(found, switch):
    assert torch.equal(found.weight, switch.weight)
    assert (found.bias, found.facts) == (switch.bias, switch.facts)


def rewritten(file, *, tensors=None, **metadata):
    """Write a file anew with other tensors or metadata; None takes one away."""
    with safe_open(file, framework="pt") as opened:
        kept = {**(opened.metadata() or {}), **metadata}
    found = {**load_file(file), **(tensors or {})}
    save_file(
        {name: value for name, value in found.items() if value is not None},
        file,
        {name: value for name, value in kept.items() if value is not None},
    )


def test_in_the_file_of_a_prefix(model, switch, tmp_path):
    folder = write_tuned(model, tmp_path / "with", "prefix", switch)
    encoder = load_prefix(folder, model)
    assert_is(encoder.switch, switch)
    assert describe_prefix(folder).switch == FACTS
    again = save_prefix(encoder, tmp_path / "again")
    assert again.read_bytes()[:8] == (folder / PREFIX_FILE).read_bytes()[:8]
    assert_is(load_prefix(again, model).switch, switch)
    without = write_tuned(model, tmp_path / "without", "prefix", None)
    assert load_prefix(without, model).switch is None
    assert describe_prefix(without).switch is None
    export_official_prefix(encoder, tmp_path / "official")
    official = load_prefix(tmp_path / "official", model)
    assert official.switch is None
    assert torch.equal(official.embedding.weight, encoder.embedding.weight)


def test_beside_an_adapter(model, switch, tmp_path):
    folder = write_tuned(model, tmp_path, "lora", None)
    before = adapter_sha256(folder)
    assert read_switch(folder) is None
    save_switch(switch, folder)
    assert_is(read_switch(folder), switch)
    assert adapter_sha256(folder) != before
    adapted = load_adapter(folder, load("chatglm2"))
    assert_is(switch_of(adapted), switch)
    adapted.get_base_model().use_switch = False
    assert switch_of(adapted) is None
    adapted.get_base_model().use_switch = True
    detach_switch(adapted)
    assert switch_of(adapted) is None


@pytest.mark.parametrize("kind", ["prefix", "lora"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"tensors": {"switch.bias": None}}, "switch.bias is missing"),
        ({"tensors": {"switch.weight": torch.ones(2, 3)}}, "not \\[hidden\\]"),
        ({"tensors": {"switch.bias": torch.tensor([float("nan")])}}, "not finite"),
        ({"tensors": {"switch.weight": torch.ones(16, dtype=torch.int32)}}, "not of a floating type"),
        ({"switch": None}, "not the facts"),
        ({"switch": json.dumps({"kind": "logistic"})}, "not the facts"),
        ({"switch": json.dumps({**dataclasses.asdict(FACTS), "auroc": 7})}, "not the facts"),
    ],
)
def test_damage_is_refused(model, switch, tmp_path, kind, damage, says):
    folder = write_tuned(model, tmp_path, kind, switch)
    rewritten(folder / (PREFIX_FILE if kind == "prefix" else SWITCH_FILE), **damage)
    with pytest.raises(CheckpointError, match=says):
        load_prefix(folder, model) if kind == "prefix" else read_switch(folder)


def test_a_cut_file_and_a_missing_one(model, switch, tmp_path):
    folder = write_tuned(model, tmp_path, "lora", switch)
    file = folder / SWITCH_FILE
    write_manifest(folder, {})
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{SWITCH_FILE} is missing"):
        read_switch(folder)
    (folder / "checkpoint.json").unlink()
    file.write_bytes(content[:-3])
    with pytest.raises(CheckpointError, match="switch"):
        read_switch(folder)


def test_another_width(model, switch, tmp_path):
    wide = Switch(torch.ones(model.config.hidden_size + 1), 0.0, FACTS)
    with pytest.raises(ShapeError, match=f"width {model.config.hidden_size + 1}"):
        load_prefix(write_tuned(model, tmp_path / "prefix", "prefix", wide), model)
    adapted = load_adapter(write_lora(model, tmp_path / "lora", seed=1), load("chatglm2"))
    with pytest.raises(ShapeError, match=f"has {model.config.hidden_size}"):
        attach_switch(adapted, wide)


def test_a_prefix_attached_later_brings_its_own(model, switch, tmp_path):
    fresh = load("chatglm2")
    attach_prefix(fresh, load_prefix(write_tuned(model, tmp_path / "a", "prefix", switch), fresh))
    assert_is(switch_of(fresh), switch)
    attach_prefix(fresh, load_prefix(write_tuned(model, tmp_path / "b", "prefix", None), fresh))
    assert switch_of(fresh) is None
