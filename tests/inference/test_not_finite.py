"""NaN and infinity never become an answer: who loads, answers, scores or saves stops and names the tensor."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from glmtune.errors import CheckpointError, GlmtuneError
from glmtune.inference.engine.engine import Engine
from glmtune.inference.perplexity import token_losses
from glmtune.inference.predict.generate import generate_ids
from glmtune.inference.settings import GenerationSettings
from glmtune.loading import load_model
from glmtune.models.checkpoints.finite import first_not_finite
from glmtune.models.load import load_official
from glmtune.models.placeholders import placeholder
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.checkpoint import PREFIX_FILE, load_prefix, save_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from glmtune.training.adapt import TunedModel, tune_adapter
from glmtune.training.settings import LoraSettings

PROMPTS = [[3, 5, 8, 4], [3, 5]]
NAN, INF = float("nan"), float("inf")


def generate(model: nn.Module) -> object:
    decode = lambda ids: " ".join(map(str, ids))  # noqa: E731
    return list(Engine(model).generate(PROMPTS, max_new_tokens=3, stop_ids=[2], decode=decode))  # type: ignore[arg-type]


def score(model: nn.Module) -> object:
    return list(Engine(model).score_next(PROMPTS, [[4, 5]] * 2))  # type: ignore[arg-type]


def predict(model: nn.Module) -> object:
    return list(
        generate_ids(model, PROMPTS, GenerationSettings(max_new_tokens=3), stop_ids=[2], pad_id=0)  # type: ignore[arg-type]
    )


def sample(model: nn.Module) -> object:
    settings = GenerationSettings(max_new_tokens=3, do_sample=True, repetition_penalty=1.2)
    return list(generate_ids(model, PROMPTS, settings, stop_ids=[2], pad_id=0))  # type: ignore[arg-type]


def beams(model: nn.Module) -> object:
    settings = GenerationSettings(max_new_tokens=3, num_beams=2)
    return list(generate_ids(model, PROMPTS, settings, stop_ids=[2], pad_id=0))  # type: ignore[arg-type]


def perplexity(model: nn.Module) -> object:
    return token_losses(model, lambda text: ([3], [5, 8, 4]), "text", window_tokens=8)  # type: ignore[arg-type]


WAYS = [generate, score, predict, sample, beams, perplexity]
Way = Callable[[nn.Module], object]


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> nn.Module:
    return load_official(tiny_base, dtype="float32", device="cpu")


def poisoned(model: nn.Module, name: str, value: float) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[1] = value
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_weight_that_is_not_finite_is_named(way: Way, value: float, base: nn.Module) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(CheckpointError, match=rf"output is not finite, as its tensor {name} holds"):
        way(poisoned(base, name, value))
    way(base)


@pytest.mark.parametrize("way", WAYS)
def test_numbers_that_become_too_large_are_told_from_damage(way: Way, base: nn.Module) -> None:
    model = copy.deepcopy(base)
    with torch.no_grad():
        dict(model.named_parameters())["model.layers.0.mlp.gate_up_proj.weight"].fill_(3e38)
    with pytest.raises(GlmtuneError, match=r"every weight is.*too large for float32.*model\.dtype=bfloat16"):
        way(model)


def test_prefix_adapter_and_codes_are_searched_as_well(base: nn.Module, tiny_base: Path) -> None:
    model = copy.deepcopy(base)
    attach_prefix(model, PrefixEncoder(prefix_shape(model.config), pre_seq_len=2))  # type: ignore[arg-type]
    prefix = next(name for name, _ in model.named_parameters() if "embedding.weight" in name)
    with pytest.raises(CheckpointError, match=f"its tensor {prefix} holds"):
        generate(poisoned(model, prefix, NAN))
    adapted = tune_adapter(copy.deepcopy(base), LoraSettings(rank=2)).model  # type: ignore[arg-type]
    adapter = next(name for name, _ in adapted.named_parameters() if "v_proj.lora_B" in name)
    with pytest.raises(CheckpointError, match=f"its tensor {adapter} holds"):
        score(poisoned(adapted, adapter, NAN))
    codes = load_model(tiny_base, dtype="float32", device="cpu", quantization="int8")
    layer = next(module for module in codes.modules() if hasattr(module, "stored_codes"))
    state = layer.state_dict()
    layer.load_state_dict(state | {"weight_scale": state["weight_scale"].float().fill_(NAN)})
    with pytest.raises(CheckpointError, match=r"its tensor \S+\.weight_scale holds"):
        perplexity(codes)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_file_of_garbage_is_refused_on_loading(value: float, tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(tiny_base, folder)
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
    tensors[name][3, 1] = value  # a query: attention on CPUs would make a zero of it, and nothing showed
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{file.name}: tensor {name}, read as float32, holds numbers"):
        load_official(folder, dtype="float32")


def test_scales_of_codes_are_looked_at_on_loading(tiny_base: Path, tmp_path: Path) -> None:
    load_model(tiny_base, quantization="int8", device="cpu").save_pretrained(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[name][0] = NAN
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"tensor {name}, read as .* holds numbers that are not finite"):
        load_model(tmp_path, device="cpu")


def test_a_prefix_is_neither_saved_nor_loaded(base: nn.Module, tmp_path: Path) -> None:
    encoder = PrefixEncoder(prefix_shape(base.config), pre_seq_len=2)  # type: ignore[arg-type]
    before = save_prefix(encoder, tmp_path).read_bytes()
    with torch.no_grad():
        encoder.embedding.weight[1, -1] = NAN
    with pytest.raises(CheckpointError, match=r"Nothing is saved to .*embedding\.weight holds"):
        save_prefix(encoder, tmp_path)
    file = tmp_path / PREFIX_FILE
    assert file.read_bytes() == before
    save_file({"embedding.weight": encoder.embedding.weight.detach()}, file)
    with pytest.raises(CheckpointError, match=r"not finite.*first in embedding\.weight"):
        load_prefix(tmp_path, base)  # type: ignore[arg-type]


def test_neither_are_an_adapter_or_a_model(base: nn.Module, tmp_path: Path) -> None:
    adapted = tune_adapter(copy.deepcopy(base), LoraSettings(rank=2))  # type: ignore[arg-type]
    adapted.save(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with torch.no_grad():
        next(weight for name, weight in adapted.model.named_parameters() if "lora_A" in name)[0, 0] = INF
    with pytest.raises(CheckpointError, match=r"Nothing is saved to .*lora_A\S* holds"):
        adapted.save(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    full = TunedModel(poisoned(base, "model.norm.weight", NAN), None)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds"):
        full.save(tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_what_has_no_numbers_is_passed_over() -> None:
    tensors = {
        "meta": torch.empty(3, device="meta"),
        "placeholder": placeholder((4, 4)),
        "codes": torch.ones(3, dtype=torch.int8),
        "empty": torch.empty(0),
        "large": torch.full((4,), 3e38),
    }
    assert first_not_finite(tensors.items()) is None
    assert first_not_finite([*tensors.items(), ("bad", torch.tensor([1, -INF]))]) == "bad"
