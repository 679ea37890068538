"""Trainer settings: what they refuse, and how they reach the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from glmtune.errors import ConfigError
from glmtune.settings import build_settings
from glmtune.training.arguments import compute_precision, training_arguments
from glmtune.training.settings import LoraSettings, TrainerSettings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_steps": 0}, ["`trainer.max_steps` is 0", "at least 1"]),
        ({"max_steps": None}, ["max_steps", "num_train_epochs", "both null", "trainer.max_steps=3000"]),
        ({"num_train_epochs": 2.0}, ["is 3000", "is 2.0", "trainer.max_steps=null"]),
        ({"max_steps": None, "num_train_epochs": -1.0}, ["num_train_epochs` is -1.0", "above 0"]),
        ({"learning_rate": -0.1}, ["`trainer.learning_rate` is -0.1", "at least 0"]),
        ({"lr_scheduler_type": "cosin"}, ["`cosin`", "Did you mean `cosine`"]),
        ({"optim": "adam"}, ["`adam`", "adamw_torch"]),
        ({"precision": "int8"}, ["`int8`", "bf16"]),
        ({"report_to": ["tensorbord"]}, ["`tensorbord`", "Did you mean `tensorboard`"]),
        ({"metric_for_best_model": "acuracy"}, ["`acuracy`", "Did you mean `accuracy`"]),
        ({"per_device_train_batch_size": 0}, ["`trainer.per_device_train_batch_size` is 0"]),
        ({"gradient_accumulation_steps": 0}, ["`trainer.gradient_accumulation_steps` is 0"]),
        ({"save_steps": 0}, ["`trainer.save_steps` is 0"]),
        ({"eval_steps": 0}, ["`trainer.eval_steps` is 0"]),
        ({"num_threads": 0}, ["`trainer.num_threads` is 0"]),
        ({"dataloader_num_workers": -1}, ["`trainer.dataloader_num_workers` is -1"]),
        ({"warmup_ratio": 1.5}, ["`trainer.warmup_ratio` is 1.5", "from 0 to 1"]),
        ({"adam_beta2": 1.5}, ["`trainer.adam_beta2` is 1.5"]),
        ({"warmup_steps": 10, "warmup_ratio": 0.1}, ["is 10", "is 0.1", "Leave one at 0"]),
    ],
)
def test_refused(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainerSettings(**values)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank": 0}, ["`lora.rank` is 0"]),
        ({"alpha": 0.0}, ["`lora.alpha` is 0.0", "above 0"]),
        ({"dropout": 1.0}, ["`lora.dropout` is 1.0"]),
        ({"targets": []}, ["`lora.targets` is empty"]),
    ],
)
def test_lora_refused(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraSettings(**values)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_names_and_types_are_checked() -> None:
    with pytest.raises(ConfigError, match="Did you mean `learning_rate`"):
        build_settings(TrainerSettings, {"learning_rat": 1.0})
    with pytest.raises(ConfigError, match="valid integer"):
        build_settings(TrainerSettings, {"max_steps": "many"})


def test_defaults_are_the_official_ones() -> None:
    settings = TrainerSettings()
    assert (settings.learning_rate, settings.max_steps, settings.gradient_accumulation_steps) == (
        2e-2,
        3000,
        16,
    )
    assert (settings.per_device_train_batch_size, settings.logging_steps, settings.save_steps) == (
        1,
        10,
        1000,
    )
    assert (settings.lr_scheduler_type, settings.warmup_steps) == ("linear", 0)


def test_settings_reach_the_trainer(tmp_path: Path) -> None:
    settings = TrainerSettings(
        max_steps=None,
        num_train_epochs=1.5,
        warmup_ratio=0.1,
        adam_beta2=0.95,
        weight_decay=0.05,
        optim="adamw_torch_fused",
        gradient_checkpointing=True,
        report_to=["tensorboard"],
    )
    args = training_arguments(
        settings, output_dir=tmp_path, seed=3, device="cpu", autocast="bf16", evaluates=False
    )
    assert (args.max_steps, args.num_train_epochs, args.seed) == (-1, 1.5, 3)
    assert (args.warmup_steps, args.adam_beta2, args.weight_decay) == (0.1, 0.95, 0.05)
    assert (args.bf16, args.fp16, args.use_cpu) == (True, False, True)
    assert args.gradient_checkpointing
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert args.report_to == []  # the session starts them, with all settings
    assert args.run_name == tmp_path.name
    assert args.eval_strategy == "no"


@pytest.mark.parametrize(
    ("precision", "tune", "dtype", "device", "expected"),
    [
        ("auto", "prefix", torch.bfloat16, "cpu", "no"),
        ("auto", "full", torch.float32, "cpu", "no"),
        ("bf16", "full", torch.float32, "cpu", "bf16"),
        ("fp16", "full", torch.float32, "cuda", "fp16"),
        ("fp32", "full", torch.bfloat16, "cpu", "no"),
        ("fp32", "prefix", torch.float32, "cpu", "no"),
    ],
)
def test_precision(precision: str, tune: str, dtype: torch.dtype, device: str, expected: str) -> None:
    settings = TrainerSettings(precision=precision)
    assert compute_precision(settings, tune=tune, dtype=dtype, device=device) == expected


@pytest.mark.parametrize(
    ("precision", "tune", "dtype", "device", "expected"),
    [
        ("auto", "prefix", torch.bfloat16, "cpu", "bf16"),
        ("auto", "lora", torch.float16, "cuda", "fp16"),
        ("auto", "prefix", torch.float32, "cuda", "no"),
        ("bf16", "prefix", torch.float32, "cpu", "bf16"),
        ("auto", "full", torch.float32, "cpu", "no"),
    ],
)
def test_precision_of_deepspeed(
    precision: str, tune: str, dtype: torch.dtype, device: str, expected: str
) -> None:
    settings = TrainerSettings(precision=precision)
    assert compute_precision(settings, tune=tune, dtype=dtype, device=device, zero=True) == expected


def test_deepspeed_in_float16_needs_a_gpu() -> None:
    settings = TrainerSettings()
    with pytest.raises(ConfigError, match=r"`model.dtype` is `float16`.*needs a GPU.*model.dtype=bfloat16"):
        compute_precision(settings, tune="prefix", dtype=torch.float16, device="cpu", zero=True)


@pytest.mark.parametrize(
    ("precision", "dtype", "words"),
    [
        ("fp16", torch.float32, ["fp16", "needs a GPU", "trainer.precision=bf16"]),
        ("fp32", torch.bfloat16, ["fp32", "bfloat16", "model.dtype=float32"]),
    ],
)
def test_precision_that_cannot_be(precision: str, dtype: torch.dtype, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compute_precision(TrainerSettings(precision=precision), tune="prefix", dtype=dtype, device="cpu")
    assert all(word in str(caught.value) for word in words), str(caught.value)
