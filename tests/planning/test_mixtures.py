"""Mixtures of experts in `plan`: sizes as transformers counts them, bytes as autograd keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    PreTrainedModel,
)

from glmtune.cli import main
from glmtune.models.other import load_other
from glmtune.planning import activations as kept
from glmtune.planning.estimate import _kept_blocks, estimate
from glmtune.planning.geometry import read_geometry
from glmtune.planning.states import base_bytes, num_trained
from glmtune.planning.workload import Batch, Sharding, Workload
from glmtune.training.adapt import tune_adapter
from glmtune.training.settings import LoraSettings
from tests.planning.test_activations import LENGTH, saved_storages

SIZES: dict[str, Any] = {"vocab_size": 256, "hidden_size": 96, "intermediate_size": 136}
SIZES |= {"num_hidden_layers": 4, "num_attention_heads": 6, "pad_token_id": 0, "eos_token_id": 1}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3}
LATENT: dict[str, Any] = {"kv_lora_rank": 40, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
PLAIN: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "glm4_moe": (Glm4MoeConfig, Glm4MoeForCausalLM, PLAIN | {"attention_bias": True}),
    "glm4_moe, norms of heads, two plain blocks, groups": (
        Glm4MoeConfig,
        Glm4MoeForCausalLM,
        PLAIN | {"use_qk_norm": True, "first_k_dense_replace": 2, "n_group": 4, "topk_group": 2},
    ),
    "glm4_moe_lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM, LATENT | {"q_lora_rank": 32}),
    "glm4_moe_lite, biases": (
        Glm4MoeLiteConfig,
        Glm4MoeLiteForCausalLM,
        LATENT | {"q_lora_rank": 32, "attention_bias": True},
    ),
    "glm4_moe_lite, whole queries": (
        Glm4MoeLiteConfig,
        Glm4MoeLiteForCausalLM,
        LATENT | {"q_lora_rank": None},
    ),
}
LORA = LoraSettings(rank=4)


def make(kind: str, folder: Path) -> PreTrainedModel:
    config_class, model_class, more = KINDS[kind]
    heads = {} if "num_key_value_heads" in more else {"num_key_value_heads": 6}
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **EXPERTS, **heads, **more}))
    model.save_pretrained(folder)
    return model


def work(folder: Path, dtype: torch.dtype, *, is_padded: bool) -> Workload:
    labels = 2 * (LENGTH - 22) - (5 if is_padded else 0)
    return Workload(
        geometry=read_geometry(str(folder)),
        device="cpu",
        weight_bytes=dtype.itemsize,
        autocast=False,
        tune="lora",
        prefix=None,
        lora=LORA,
        method=None,
        batch=Batch(rows=2, length=LENGTH, num_labels=labels, is_padded=is_padded),
        sharding=Sharding(),
        checkpointing=False,
        optim="adamw_torch",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_the_model_and_of_what_is_trained(kind: str, tmp_path: Path) -> None:
    model = make(kind, tmp_path)
    w = work(tmp_path, torch.float32, is_padded=False)
    assert w.geometry.num_parameters == model.num_parameters()
    assert base_bytes(w) == 4 * model.num_parameters()
    tuned: Any = tune_adapter(_loaded(tmp_path, torch.float32), LORA).model
    assert num_trained(w) == tuned.num_parameters(only_trainable=True)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_bytes(kind: str, dtype: torch.dtype, is_padded: bool, tmp_path: Path) -> None:
    make(kind, tmp_path)
    w = work(tmp_path, dtype, is_padded=is_padded)
    model: Any = tune_adapter(_loaded(tmp_path, dtype), LORA).model
    model.config.use_cache = False
    ids = torch.randint(4, 248, (2, LENGTH))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :22] = -100
    if is_padded:
        mask[-1, -5:], labels[-1, -5:] = 0, -100
    buffers = {tensor.untyped_storage().data_ptr() for tensor in model.buffers()}
    with saved_storages(model) as found:
        model.train()(input_ids=ids, labels=labels, attention_mask=mask, labelled_only=True)
    sizes = [t.untyped_storage().nbytes() for place, t in found.items() if place not in buffers]
    g, num_labels = w.geometry, w.batch.num_labels
    rotated = g.head_dim if g.latent is not None else g.head_dim // 2
    rotary = 2 * LENGTH * rotated * dtype.itemsize
    small = rotary + 2 * (LENGTH - 1) + 8 * num_labels + 4
    head = kept.head_bytes(w) + 4 * num_labels * g.vocab_size
    assert sum(sizes) == _kept_blocks(w) + head + small


def _loaded(folder: Path, dtype: torch.dtype) -> Any:
    kind = "glm4_moe" if (folder / "config.json").read_text().count('"glm4_moe"') else "glm4_moe_lite"
    return load_other(
        folder, folder, model_type=kind, dtype=dtype, device=torch.device("cpu"), attn_implementation=None
    )


def test_released_sizes() -> None:
    """Those in transformers' configurations, which are GLM-4.5-Air's and GLM-4.7-Flash's: 106 and 30 billion."""
    for config, billions in ((Glm4MoeConfig(head_dim=128), 106), (Glm4MoeLiteConfig(), 30)):
        with torch.device("meta"):
            model = {"glm4_moe": Glm4MoeForCausalLM, "glm4_moe_lite": Glm4MoeLiteForCausalLM}[
                config.model_type
            ](config)
        assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=0.05)


@pytest.mark.parametrize("kind", ["glm4_moe", "glm4_moe_lite"])
def test_plan_of_a_folder(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The release's sizes; weights are not read.
    KINDS[kind][0](**({"head_dim": 128} if kind == "glm4_moe" else {})).save_pretrained(tmp_path)
    given = ["plan", f"model={tmp_path}", "hardware=8x80GB+1024GB"]
    # 106 billion 16-bit numbers are 198 GiB, which no card of 80 GB holds; 30 billion are 56 GiB
    assert main([*given, "+recipe=lora"]) == (3 if kind == "glm4_moe" else 0)
    shown = capsys.readouterr().out
    assert f"{read_geometry(str(tmp_path)).num_parameters:,} parameters" in shown
    for words, message in (
        (["+recipe=ptuning"], "has no place for a prefix yet"),
        (["+recipe=full"], "is too large to tune as a whole here"),
        (["+recipe=lora", "quantization=int4"], "has no codes for"),
        (["+recipe=lora", "deepspeed=zero3"], "which every process holds as a whole"),
        (["+recipe=lora", "probe=true"], "Leave"),
    ):
        more = ["plan", f"model={tmp_path}"] if "probe=true" in words else given
        assert main([*more, *words]) == 2
        assert message in capsys.readouterr().err


def test_more_experts_take_more_memory(tmp_path: Path) -> None:
    make("glm4_moe", tmp_path)
    w = work(tmp_path, torch.float32, is_padded=True)
    moments = estimate(w).moments
    assert moments["head"] > base_bytes(w)
