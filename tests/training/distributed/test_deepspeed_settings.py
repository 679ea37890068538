"""DeepSpeed's dictionary: made of typed settings, or of an existing file whose gaps are filled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glmtune.errors import ConfigError, MissingExtraError
from glmtune.training.distributed import deepspeed_settings
from glmtune.training.distributed.deepspeed_settings import DeepSpeedSettings, deepspeed_config
from glmtune.training.settings import TrainerSettings
from recipes.train import COMMAND
from recipes.words.compose import load_settings

TRAINER = TrainerSettings(per_device_train_batch_size=2, gradient_accumulation_steps=4, learning_rate=1e-4)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dictionary is plain data: it needs no DeepSpeed."""
    monkeypatch.setattr(deepspeed_settings, "check_installed", lambda settings: None)


def built(*, trainer: TrainerSettings = TRAINER, gpu: bool = True, **values: Any) -> dict[str, Any]:
    return deepspeed_config(DeepSpeedSettings(**values), trainer, precision="bf16", has_gpu=gpu)


def test_stage_2() -> None:
    config = built()
    assert config["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 200_000_000,
        "allgather_partitions": True,
        "allgather_bucket_size": 200_000_000,
    }
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 4)
    assert (config["gradient_clipping"], config["bf16"], config["fp16"]) == (
        1.0,
        {"enabled": True},
        {"enabled": False, **deepspeed_settings.LOSS_SCALE},
    )
    assert "optimizer" not in config


def test_fp16_scales_the_loss() -> None:
    config = deepspeed_config(DeepSpeedSettings(), TRAINER, precision="fp16", has_gpu=True)
    assert config["bf16"] == {"enabled": False}
    assert config["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_file_keeps_its_own_loss_scale(precision: str, tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    scale = {"loss_scale": 128, "initial_scale_power": 12}
    file.write_text(
        json.dumps({"zero_optimization": {"stage": 2}, "fp16": {"enabled": "auto", **scale}}),
        encoding="utf-8",
    )
    settings = DeepSpeedSettings(config_file=str(file))
    config = deepspeed_config(settings, TRAINER, precision=precision, has_gpu=True)
    assert config["fp16"] == {"enabled": precision == "fp16", **scale}
    assert config["bf16"] == {"enabled": precision == "bf16"}


def test_file_that_wants_fp16_where_the_settings_do_not(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": true}}')
    with pytest.raises(ConfigError, match=r"`fp16.enabled` to True, but `trainer.precision` says False"):
        built(config_file=str(file))


def test_groups_say_what_is_divided() -> None:
    found = {}
    for name in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"):
        settings = load_settings(COMMAND, ["+recipe=full", f"deepspeed={name}"]).deepspeed
        found[name] = (settings.stage, settings.offload_optimizer, settings.offload_param)
    assert found == {
        "zero1": (1, False, False),
        "zero2": (2, False, False),
        "zero2_offload": (2, True, False),
        "zero3": (3, False, False),
        "zero3_offload": (3, True, True),
    }
    assert load_settings(COMMAND, ["+recipe=full"]).deepspeed is None


def test_offloaded_states_take_the_compiled_optimizer_where_it_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deepspeed_settings.shutil, "which", lambda name: "/usr/bin/g++")
    config = built(stage=3, offload_optimizer=True, offload_param=True)
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert config["optimizer"]["type"] == "AdamW"
    assert config["optimizer"]["params"]["lr"] == 1e-4
    assert "optimizer" not in built(stage=3, offload_optimizer=True, gpu=False)
    monkeypatch.setattr(deepspeed_settings.shutil, "which", lambda name: None)
    assert "optimizer" not in built(stage=3, offload_optimizer=True)
    with pytest.raises(ConfigError, match=r"cpu_adam` is true.*g\+\+ not found"):
        built(offload_optimizer=True, cpu_adam=True)


def test_file_is_filled(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    official = {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
        "zero_optimization": {"stage": 2, "allgather_bucket_size": 5e8},
    }
    file.write_text(json.dumps(official))
    config = built(config_file=str(file))
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert "train_batch_size" not in config
    assert config["optimizer"]["params"] == {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8}
    assert (config["bf16"], config["fp16"]) == ({"enabled": True}, {"enabled": False})
    assert config["zero_optimization"] == {"stage": 2, "allgather_bucket_size": 5e8}
    assert load_settings(COMMAND, [f"deepspeed.config_file={file}"]).deepspeed.config_file == str(file)


WARMUP = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}


@pytest.mark.parametrize("scheduler", [None, "auto", {"type": "WarmupLR", "params": WARMUP}])
@pytest.mark.parametrize("total", [None, "auto", 32])
def test_what_a_file_leaves_to_the_run_is_no_contradiction(
    scheduler, total, tmp_path, monkeypatch, caplog
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    file = tmp_path / "deepspeed.json"
    values = {"scheduler": scheduler, "train_batch_size": total, "fp16": None, "optimizer": None}
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": None}, **values}))
    config = built(config_file=str(file))
    assert not {"scheduler", "train_batch_size", "optimizer"} & config.keys()
    assert config["fp16"] == {"enabled": False}
    assert ("trainer.lr_scheduler_type" in caplog.text) == bool(scheduler)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"zero_optimization": {"stage": 2}, "train_batch_size": 64}', ["64", "2 x", "4 x", "make 8"]),
        ('{"zero_optimization": {"stage": 2}, "train_batch_size": "many"}', ["many", "make 8"]),
        ('{"zero_optimization": null}', ["zero_optimization.stage", "leave `deepspeed` out"]),
        (
            '{"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}}',
            ["scheduler", "lr_scheduler_type"],
        ),
        (
            '{"zero_optimization": {"stage": 2}, "gradient_clipping": 3}',
            ["gradient_clipping", "3", "1.0", "auto"],
        ),
        ('{"zero_optimization": {"stage": 4}}', ["stage` 4", "1, 2 or 3"]),
        ('{"zero_optimization": {"stage": 2}, "scheduler": {}}', ["scheduler", "lr_scheduler_type"]),
        ("{", ["no JSON"]),
        ("[" * 100_000, ["no JSON"]),
        ("null", ["zero_optimization.stage"]),
        ('{"zero_optimization": []}', ["zero_optimization.stage"]),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": ["cpu"]}}',
            ["`zero_optimization.offload_optimizer` ['cpu']"],
        ),
        (
            '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "much"}}',
            ["`zero_optimization.reduce_bucket_size` much"],
        ),
        ('{"zero_optimization": {"stage": 2}, "optimizer": []}', ["`optimizer` []"]),
        (None, ["cannot be read", "deepspeed=zero2"]),
    ],
)
def test_file_that_cannot_be_used(content: str | None, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        built(config_file=str(file))
    assert all(word in str(caught.value) for word in [*words, "deepspeed.json"]), str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stage": 0}, "`deepspeed.stage` is 0"),
        ({"stage": 2, "offload_param": True}, "only stage 3 divides weights"),
        ({"bucket_size": 0}, "`deepspeed.bucket_size` is 0"),
    ],
)
def test_settings_that_contradict(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DeepSpeedSettings(**values)


def test_optimizer_that_cannot_be_divided() -> None:
    with pytest.raises(ConfigError, match=r"trainer.optim.*adafactor.*adamw_torch"):
        built(trainer=TrainerSettings(optim="adafactor"))


def test_not_installed(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(deepspeed_settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"glmtune\[deepspeed\]"):
        built()
