"""`format=peft`: plain PEFT puts the adapter on transformers' own model and answers as ours does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from glmtune.adapter import load_adapter
from glmtune.cli import main
from glmtune.errors import CheckpointError, ConfigError
from glmtune.export.export import Exported, export
from glmtune.export.source import ExportJob
from glmtune.loading import load_base
from glmtune.models.load import load_official
from glmtune.training.adapt import tune_adapter
from glmtune.training.settings import LoraSettings
from tests.adapter.test_official import write_adapter
from tests.models.transformers_folders import make_folder

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")


def exported(
    source: Path | str, form: str, folder: Path, adapter: Path | None = None, **changes: Any
) -> Exported:
    values: dict[str, Any] = {"family": None, "prefix_path": None, "dtype": None, "max_shard_bytes": 2**30}
    values |= {"overwrite": False, "adapter_path": None if adapter is None else str(adapter)} | changes
    return export(ExportJob(source=str(source), format=form, output_dir=folder, **values))


def tuned(base: Path | str, folder: Path, targets: tuple[str, ...] = LAYERS) -> Path:
    """An adapter of our own training, its second matrices not zero."""
    torch.manual_seed(3)
    adapter = tune_adapter(
        load_base(base, dtype="float32", device="cpu"), LoraSettings(rank=4, targets=targets)
    )
    for name, weight in adapter.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    adapter.save(folder)
    return folder


def answers(base: Path | str, adapter: Path, scale: float = 1.0) -> torch.Tensor:
    return load_adapter(adapter, load_base(base, dtype="float32", device="cpu"), scale=scale)(
        IDS
    ).logits.detach()


def theirs(base: Path | str, adapter: Path, tmp_path: Path) -> torch.Tensor:
    """What PEFT and transformers make of base and adapter, without our code."""
    exported(base, "transformers", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert type(model).__module__.startswith("transformers.models.")
    return PeftModel.from_pretrained(model, str(adapter)).eval()(IDS).logits.detach()


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), LAYERS], ids=["q and v", "all"])
def test_plain_peft_answers_as_ours(targets: tuple[str, ...], tiny_base: Path, tmp_path: Path) -> None:
    adapter = tuned(tiny_base, tmp_path / "lora", targets)
    result = exported(tiny_base, "peft", tmp_path / "out", adapter)
    assert result.max_difference <= result.limit
    found = theirs(tiny_base, tmp_path / "out", tmp_path)
    torch.testing.assert_close(found, answers(tiny_base, adapter), atol=1e-5, rtol=0)
    assert settings(tmp_path / "out")["target_modules"] == sorted(targets)
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == set(targets)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    again = answers(tiny_base, tmp_path / "out")
    torch.testing.assert_close(again, answers(tiny_base, adapter), atol=1e-6, rtol=0)


def test_for_vllm_the_halves_of_the_fused_layer_are_apart(tiny_base: Path, tmp_path: Path) -> None:
    adapter = tuned(tiny_base, tmp_path / "lora", ("q_proj", "gate_up_proj"))
    exported(tiny_base, "peft", tmp_path / "out", adapter)
    whole = load_file(tmp_path / "out" / "adapter_model.safetensors")
    halves = load_file(tmp_path / "out" / "vllm" / "adapter_model.safetensors")
    assert settings(tmp_path / "out" / "vllm")["target_modules"] == ["gate_proj", "q_proj", "up_proj"]
    assert not [name for name in halves if "gate_up_proj" in name]
    for name, weight in whole.items():
        gate, up = (halves.get(name.replace("gate_up_proj", half)) for half in ("gate_proj", "up_proj"))
        assert gate is not None
        assert up is not None
        same = gate.equal(weight) and up.equal(weight)
        assert torch.cat([gate, up]).equal(weight) if ".mlp." in name and "lora_B" in name else same
    exported(tiny_base, "peft", tmp_path / "plain", tuned(tiny_base, tmp_path / "q", ("q_proj",)))
    assert not (tmp_path / "plain" / "vllm").exists()


@pytest.mark.parametrize("kind", ["glm", "glm4"])
def test_on_folders_in_transformers_format(kind: str, tmp_path: Path) -> None:
    base = make_folder(tmp_path / "source", kind)
    adapter = tuned(base, tmp_path / "lora")
    exported(base, "peft", tmp_path / "out", adapter)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = PeftModel.from_pretrained(model, str(tmp_path / "out")).eval()(IDS).logits
    torch.testing.assert_close(found, answers(base, adapter), atol=1e-5, rtol=0)


def test_a_scale_is_written_into_alpha(tiny_base: Path, tmp_path: Path) -> None:
    adapter = tuned(tiny_base, tmp_path / "lora")
    exported(tiny_base, "peft", tmp_path / "out", adapter, adapter_scale=0.5)
    before, after = settings(adapter), settings(tmp_path / "out")
    assert (after["r"], after["lora_alpha"]) == (before["r"], before["lora_alpha"] / 2)
    expected = answers(tiny_base, adapter, scale=0.5)
    torch.testing.assert_close(theirs(tiny_base, tmp_path / "out", tmp_path), expected, atol=1e-5, rtol=0)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert all(torch.equal(one[name], other[name]) for name in one), "only alpha carries it"


def test_what_tools_ignore_is_worked_into_the_matrices(tiny_base: Path, tmp_path: Path) -> None:
    adapter = tuned(tiny_base, tmp_path / "lora")
    file, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    for name in [name for name in tensors if ".q_proj." in name]:  # two ranks of four
        tensors[name] = (tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]).contiguous()
    from safetensors.torch import save_file

    save_file(tensors, weights)
    changed = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}
    file.write_text(json.dumps(settings(adapter) | changed))
    (adapter / "checkpoint.json").unlink(missing_ok=True)
    exported(tiny_base, "peft", tmp_path / "out", adapter)
    values = settings(tmp_path / "out")
    assert (values["use_rslora"], values["rank_pattern"], values["alpha_pattern"]) == (False, {}, {})
    assert values["r"] == 4 == values["lora_alpha"]
    shapes = {
        weight.shape[0]
        for name, weight in load_file(tmp_path / "out" / weights.name).items()
        if "lora_A" in name
    }
    assert shapes == {4}
    expected = answers(tiny_base, adapter)
    torch.testing.assert_close(theirs(tiny_base, tmp_path / "out", tmp_path), expected, atol=1e-5, rtol=0)


def test_some_blocks_are_named_in_full(tiny_base: Path, tmp_path: Path) -> None:
    adapter = tuned(tiny_base, tmp_path / "lora", ("q_proj", "down_proj"))
    weights = load_file(adapter / "adapter_model.safetensors")
    from safetensors.torch import save_file

    save_file(
        {name: w for name, w in weights.items() if ".layers.0." in name},
        adapter / "adapter_model.safetensors",
    )
    file = adapter / "adapter_config.json"
    file.write_text(
        json.dumps(settings(adapter) | {"layers_to_transform": [0], "layers_pattern": ["layers"]})
    )
    (adapter / "checkpoint.json").unlink(missing_ok=True)
    exported(tiny_base, "peft", tmp_path / "out", adapter)
    assert settings(tmp_path / "out")["target_modules"] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.q_proj",
    ]
    expected = answers(tiny_base, adapter)
    torch.testing.assert_close(theirs(tiny_base, tmp_path / "out", tmp_path), expected, atol=1e-5, rtol=0)


def test_an_adapter_of_the_released_layers_is_split(tiny_base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", tiny_base)
    exported(tiny_base, "peft", tmp_path / "out", adapter)
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ends = {name.split(".")[-3] for name in names}
    assert ends == set(LAYERS)
    stem = "base_model.model.model.layers.0.self_attn"
    assert names[f"{stem}.q_proj.lora_A.weight"].equal(names[f"{stem}.v_proj.lora_A.weight"])
    merged = load_official(adapter / "merged", dtype="float32")(IDS).logits
    torch.testing.assert_close(theirs(tiny_base, tmp_path / "out", tmp_path), merged, atol=1e-3, rtol=1e-3)
    assert settings(tmp_path / "out")["base_model_name_or_path"] == "THUDM/chatglm3-6b"


def test_what_the_format_cannot_hold_is_refused(oracles: Path, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`format` is `peft`, but no LoRA adapter.*adapter_path=RUN"):
        exported(tiny_base, "peft", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"`format` is `peft`.*no class for ChatGLM-6B.*format=tuned"):
        exported(oracles / "v1" / "checkpoint_bin", "peft", tmp_path / "out", tmp_path)
    with pytest.raises(ConfigError, match=r"`format` is `peft`, but no LoRA"):
        exported(tiny_base, "peft", tmp_path / "out", prefix_path="run")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_answers_otherwise_never_appears(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmtune.export import peft_adapter

    adapter = tuned(tiny_base, tmp_path / "lora")
    monkeypatch.setitem(peft_adapter.SETTINGS, "use_rslora", True)
    with pytest.raises(CheckpointError, match="does not answer as its source"):
        exported(tiny_base, "peft", tmp_path / "out", adapter)
    assert not (tmp_path / "out").exists()


def test_the_command(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tuned(tiny_base, tmp_path / "lora")
    words = [f"model={tiny_base}", f"adapter_path={adapter}", "format=peft", f"output_dir={tmp_path / 'out'}"]
    assert main(["export", *words]) == 0
    out = capsys.readouterr().out
    assert "reloaded and compared" in out
    assert f"adapter_path={tmp_path / 'out'}" in out
    assert main(["export", *words, "dtype=float16", "overwrite=true"]) == 2
    assert "`format=peft` writes what was tuned" in capsys.readouterr().err
