"""Adapters of the released code's layers do to our layers what they did to those."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmtune.adapter import load_adapter
from glmtune.errors import CheckpointError, ConfigError
from glmtune.loading import load_model
from glmtune.models.checkpoints.config import native_config
from glmtune.models.later import OfficialGlmForCausalLM
from glmtune.models.load import load_official
from glmtune.models.releases.families import Family

IDS = torch.tensor([[3, 5, 8, 4]])
RANK, ALPHA = 2, 6
ENDS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@pytest.fixture(scope="module", params=["grouped", "per-head"])
def base(request, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both orders of the fused rows."""
    if request.param == "grouped":
        return tiny_base
    values = json.loads((tiny_base / "config.json").read_text()) | {"multi_query_attention": False}
    values.pop("multi_query_group_num", None)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("per_head")
    OfficialGlmForCausalLM(native_config(values, Family.CHATGLM3)).save_pretrained(folder)
    return folder


def write_adapter(
    folder: Path, base: Path, ends=ENDS, *, file: str = "adapter_model.safetensors", **config
) -> Path:
    """An adapter as PEFT writes it in the released code, and the weights of the base with it merged in."""
    weights = load_file(base / "model.safetensors")
    torch.manual_seed(1)
    tensors, merged = {}, dict(weights)
    for name, weight in weights.items():
        if name.endswith(tuple(f".{end}.weight" for end in ends)) and "encoder.layers" in name:
            a, b = torch.randn(RANK, weight.shape[1]), torch.randn(weight.shape[0], RANK)
            stem = "base_model.model." + name.removesuffix(".weight")
            tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            merged[name] = weight + ALPHA / RANK * b @ a
    folder.mkdir(parents=True)
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file)
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(ends), "lora_dropout": 0.1,
             "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "task_type": "CAUSAL_LM",
             "base_model_name_or_path": "THUDM/chatglm3-6b", **config}
        )
    )  # fmt: skip
    (folder / "merged").mkdir()
    save_file(merged, folder / "merged" / "model.safetensors")
    (folder / "merged" / "config.json").write_text((base / "config.json").read_text())
    return folder


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("ends", [("query_key_value",), ENDS, ("dense_h_to_4h",)])
def test_logits_are_those_of_the_merged_release(base: Path, tmp_path: Path, ends, file: str) -> None:
    folder = write_adapter(tmp_path / "lora", base, ends, file=file)
    expected = load_official(folder / "merged")(IDS).logits
    plain = load_official(base)(IDS).logits
    found = load_adapter(folder, load_official(base))(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_ranks_and_blocks_by_official_names(tiny_base: Path, tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "lora", tiny_base, ("query_key_value",), alpha_pattern={"query_key_value": 12}
    )
    found = load_adapter(folder, load_official(tiny_base))
    scaling = found.base_model.model.model.layers[1].self_attn.k_proj.scaling
    assert scaling == {"default": 6.0}


@pytest.mark.parametrize("broken", ["missing", "shape", "foreign"])
def test_files_that_do_not_fit_are_refused(tiny_base: Path, tmp_path: Path, broken: str) -> None:
    folder = write_adapter(tmp_path / "lora", tiny_base, ("query_key_value",))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    if broken == "missing":
        del tensors[name]
    elif broken == "shape":
        tensors[name] = torch.zeros(RANK, 7)
    else:
        tensors["base_model.model.transformer.other.lora_A.weight"] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_adapter(folder, load_official(tiny_base))


def test_a_pickle_that_runs_something_is_not_run(tiny_base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", tiny_base, file="adapter_model.bin")

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Evil()}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError):
        load_adapter(folder, load_official(tiny_base))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_load_model_takes_an_adapter(tiny_base: Path, tmp_path: Path, quantization: str | None) -> None:
    folder = write_adapter(tmp_path / "run" / "last", tiny_base)
    model = load_model(tiny_base, adapter=tmp_path / "run", quantization=quantization)
    assert isinstance(model, OfficialGlmForCausalLM)
    expected = load_model(folder / "merged")(IDS).logits
    torch.testing.assert_close(
        model(IDS).logits, expected, atol=1e-3 if quantization is None else 1, rtol=0.05
    )
    assert model.fingerprint() == load_model(tiny_base, quantization=quantization).fingerprint()


def test_what_a_folder_holds_instead_is_said(tiny_base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "lora" / "last", tiny_base)
    (tmp_path / "tuned" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "tuned" / "checkpoint-3" / "prefix_encoder.safetensors").touch()
    (tmp_path / "full" / "last").mkdir(parents=True)
    (tmp_path / "full" / "last" / "config.json").write_text("{}")
    lora, tuned, full = (str(tmp_path / name) for name in ("lora", "tuned", "full"))
    for call, words in (
        (
            lambda: load_model(lora),
            ["holds a LoRA adapter", "load_model(BASE, adapter=", f"adapter_path={lora}"],
        ),
        (lambda: load_model(tuned), ["holds a prefix", "load_model(BASE, prefix=", f"prefix_path={tuned}"]),
        (lambda: load_model(full), ["holds a model", f"load_model('{full}/last')"]),
        (lambda: load_model(tiny_base, prefix=lora), ["No prefix", "holds a LoRA adapter", "adapter="]),
        (lambda: load_model(tiny_base, adapter=tuned), ["No adapter", "holds a prefix", "prefix="]),
        (
            lambda: load_model(tiny_base, adapter=str(tiny_base)),
            ["No adapter", "holds a model", "model.source="],
        ),
    ):
        with pytest.raises(CheckpointError) as caught:
            call()
        assert all(word in str(caught.value) for word in words), str(caught.value)
    with pytest.raises(ConfigError, match="`prefix` and `adapter` are both given"):
        load_model(tiny_base, prefix=tuned, adapter=lora)
