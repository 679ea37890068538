"""What is tuned, and that saving and loading it loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glmtune.errors import ConfigError
from glmtune.loading import load_base as quantized_base
from glmtune.models.load import load_official
from glmtune.models.tokenizers.load import load_tokenizer_folder
from glmtune.prefix.checkpoint import PrefixMeta, describe_prefix
from glmtune.prefix.init import build_prefix_encoder
from glmtune.prefix.settings import PrefixSettings
from glmtune.training.adapt import Tuned, count_parameters, fresh_model, tune_adapter, tune_all, tune_prefix
from glmtune.training.settings import LoraSettings

INPUTS = torch.tensor([[64, 65, 66, 67, 68]])


def adapted(kind: str, base: Path, seed: int) -> Tuned:
    torch.manual_seed(seed)
    model = load_official(base, device="cpu", dtype="bfloat16" if kind == "full" else None)
    if kind == "full":
        return tune_all(model, load_tokenizer_folder(base, model.family))
    if kind == "lora":
        return tune_adapter(model, LoraSettings(rank=2, targets=["q_proj", "o_proj"]))
    meta = PrefixMeta(base_fingerprint=model.fingerprint(), base_source=str(base), template="chatglm2")
    return tune_prefix(model, build_prefix_encoder(model, PrefixSettings(pre_seq_len=3)), meta)


def shake(tuned: Tuned) -> None:
    """Move every trained weight, as training would."""
    torch.manual_seed(99)
    for weight in tuned.model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)


def logits(tuned: Tuned) -> torch.Tensor:
    with torch.no_grad():
        return tuned.model.eval()(input_ids=INPUTS).logits


@pytest.mark.parametrize("kind", ["prefix", "lora", "full"])
def test_saved_and_loaded_again(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    first = adapted(kind, tiny_base, seed=1)
    shake(first)
    first.save(tmp_path)
    second = adapted(kind, tiny_base, seed=2)
    assert not torch.equal(logits(first), logits(second))
    second.load(tmp_path)
    assert torch.equal(logits(first), logits(second))
    assert all(weight.dtype == torch.float32 for weight in second.model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("kind", ["prefix", "lora"])
def test_base_alone(kind: str, tiny_base: Path) -> None:
    tuned = adapted(kind, tiny_base, seed=1)
    shake(tuned)
    with torch.no_grad():
        bare = load_official(tiny_base, device="cpu")(input_ids=INPUTS).logits
    with tuned.base_alone():
        assert torch.equal(logits(tuned), bare)
    assert not torch.equal(logits(tuned), bare)


@pytest.mark.parametrize("kind", ["prefix", "lora"])
def test_bypassed_is_the_base_and_touches_nothing(kind: str, tiny_base: Path) -> None:
    tuned = adapted(kind, tiny_base, seed=1)
    shake(tuned)
    with torch.no_grad():
        bare = load_official(tiny_base, device="cpu")(input_ids=INPUTS).logits
    before = logits(tuned)

    def built() -> list[object]:
        modules = [
            (name, id(module), len(module._forward_pre_hooks)) for name, module in tuned.model.named_modules()
        ]
        return [modules, [weight.requires_grad for weight in tuned.model.parameters()]]

    expected = built()
    with tuned.bypassed() as keywords:
        assert built() == expected
        with torch.no_grad():
            assert torch.equal(tuned.model(input_ids=INPUTS, **keywords).logits, bare)
    assert torch.equal(logits(tuned), before)


def test_full_tuning_has_no_base_to_bypass_to(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"`tune` is `full`.*`retain\.loss=answers`"):
        adapted("full", tiny_base, seed=1).bypassed()


def test_what_the_files_are(tiny_base: Path, tmp_path: Path) -> None:
    for kind in ("prefix", "lora", "full"):
        (tmp_path / kind).mkdir()
        adapted(kind, tiny_base, seed=1).save(tmp_path / kind)
    assert describe_prefix(tmp_path / "prefix").meta.template == "chatglm2"
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= {
        path.name for path in (tmp_path / "full").iterdir()
    }
    load_official(tmp_path / "full", device="cpu")


def test_counts(tiny_base: Path) -> None:
    trained, total = count_parameters(adapted("prefix", tiny_base, seed=1).model)
    assert trained == 3 * 2 * 2 * 2 * 8  # positions, layers, keys and values, heads, channels
    base = sum(weight.numel() for weight in load_official(tiny_base, device="cpu").parameters())
    assert total == base + trained
    assert count_parameters(adapted("full", tiny_base, seed=1).model) == (base, base)


@pytest.mark.parametrize("method", ["int4", "int8", "int4-g32-asym"])
def test_codes_count_as_the_weights_they_stand_for(method: str) -> None:
    whole = quantized_base("glm-tiny", device="cpu")
    codes = quantized_base("glm-tiny", device="cpu", quantization=method)
    assert count_parameters(codes)[1] == count_parameters(whole)[1]


def test_unknown_lora_target(tiny_base: Path) -> None:
    model = load_official(tiny_base, device="cpu")
    with pytest.raises(ConfigError, match=r"`lora.targets` is `query_key_value`.*q_proj"):
        tune_adapter(model, LoraSettings(targets=["query_key_value"]))


def test_fresh_weights_need_no_checkpoint(tiny_base: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_base / name).read_bytes())
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(fresh_model(str(tmp_path), device="cpu", family=None).lm_head.weight)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])
    assert models[0].dtype == torch.float32
    assert 0.01 < models[0].std().item() < 0.5
