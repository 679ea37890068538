"""Optimizers and compiling: what is missing is said, what is there is used."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from glmtune.errors import ConfigError, MissingExtraError
from glmtune.models.architectures.compiling import check_compiler, compile_layers
from glmtune.training.arguments import training_arguments
from glmtune.training.settings import OPTIMIZERS, TrainerSettings
from glmtune.training.trainer import GlmTrainer
from recipes.train import COMMAND
from recipes.words.compose import load_settings

MakeTrainer = Callable[..., GlmTrainer]


def arguments_for(optim: str, folder: Path) -> Any:
    return training_arguments(
        TrainerSettings(optim=optim), output_dir=folder, seed=0, device="cpu", autocast="no", evaluates=False
    )


@pytest.mark.parametrize("name", [name for name, package in OPTIMIZERS.items() if package is None])
def test_plain_optimizers_need_nothing(name: str, tmp_path: Path) -> None:
    assert arguments_for(name, tmp_path).optim == name


@pytest.mark.parametrize(
    ("name", "other"), [("paged_adamw_8bit", "adamw_bnb_8bit"), ("paged_adamw_32bit", "adamw_torch")]
)
def test_paged_optimizers_need_a_gpu(name: str, other: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"`trainer.optim` is `{name}`.*the CPU.*trainer.optim={other}"):
        arguments_for(name, tmp_path)


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "adamw_torch_8bit"])
def test_a_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted: None if wanted == OPTIMIZERS[name] else found(wanted)
    )
    with pytest.raises(MissingExtraError, match=rf"trainer.optim={name}.*glmtune\[optimizers\]"):
        arguments_for(name, tmp_path)


def test_moments_in_eight_bits(make_trainer: MakeTrainer) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plain, short = make_trainer(folder="plain"), make_trainer(folder="short", optim="adamw_bnb_8bit")
    losses = []
    for trainer in (plain, short):
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert type(short.optimizer.optimizer).__module__.startswith("bitsandbytes")


def test_compiling_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing)
    with pytest.raises(ConfigError, match=r"`trainer.torch_compile` is true.*`cpu`.*a C\+\+ compiler"):
        compile_layers(nn.Linear(2, 2))
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(ConfigError, match=r"`trainer.torch_compile` is true.*needs Triton on a GPU"):
        check_compiler(torch.device("cuda"), setting="trainer.torch_compile")


def test_every_layer_is_compiled_in_place(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "/usr/bin/c++")
    model = make_trainer().tuned.model
    names = list(model.state_dict())
    assert compile_layers(model) == model.config.num_hidden_layers
    assert list(model.state_dict()) == names
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["distributed=fsdb"], r"`distributed` is `fsdb`, which does not exist. Did you mean `fsdp`\?"),
        (["distributed=fsdp", "deepspeed=zero2"], r"`distributed` is `fsdp` and `deepspeed` is set"),
        (
            ["distributed=fsdp", "trainer.torch_compile=true"],
            r"torch_compile` is true, but `distributed=fsdp`",
        ),
        (["tune=prefix", "prefix={pre_seq_len: 4}", "trainer.torch_compile=true"], r"`tune` is `prefix`"),
        (["deepspeed=zero2", "trainer.torch_compile=true"], r"torch_compile` is true, but `deepspeed`"),
    ],
)
def test_what_cannot_go_together(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_settings(COMMAND, ["+recipe=full", *overrides])


def test_codes_are_not_divided() -> None:
    with pytest.raises(ConfigError, match=r"`distributed` is `fsdp`, but `model.quantization` is `int4`"):
        load_settings(COMMAND, ["+recipe=lora", "distributed=fsdp", "model.quantization=int4"])
