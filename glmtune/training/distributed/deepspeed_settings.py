"""The settings of DeepSpeed's ZeRO, and the dictionary made of them or of a user's own deepspeed.json."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glmtune.errors import ConfigError, MissingExtraError
from glmtune.settings import check_choice, check_range, setting
from glmtune.training.settings import TrainerSettings

STAGES = (1, 2, 3)
# Optimizers that update every number by itself, so that ZeRO may cut their states anywhere. Adafactor keeps
# sums of rows and columns, which need the whole matrix.
SHARDABLE = ("adamw_torch", "adamw_torch_fused", "sgd")
# What a configuration file may leave to us, and may not contradict: path -> the setting that decides it.
DECIDED = {
    "train_micro_batch_size_per_gpu": "trainer.per_device_train_batch_size",
    "gradient_accumulation_steps": "trainer.gradient_accumulation_steps",
    "gradient_clipping": "trainer.max_grad_norm",
    "optimizer.params.lr": "trainer.learning_rate",
    "optimizer.params.betas": "trainer.adam_beta1, trainer.adam_beta2",
    "optimizer.params.eps": "trainer.adam_epsilon",
    "optimizer.params.weight_decay": "trainer.weight_decay",
    "bf16.enabled": "trainer.precision",
    "fp16.enabled": "trainer.precision",
}

LOGGER = logging.getLogger(__name__)

FILE_BUCKET_SIZE = 500_000_000
"""DeepSpeed's own, for a configuration file without one."""
ZERO_EXTRAS = ("stage3_max_", "stage3_prefetch_", "zero_", "sub_group_size", "cpu_offload")
FILE_EXTRAS = (
    "activation_checkpointing",
    "tensor_parallel",
    "compression_training",
    "data_types",
    "torch_autocast",
)
"""What of a configuration file changes memory in ways that `glmtune plan` does not follow."""

# DeepSpeed's own defaults, written out: a run's numbers must not change with its version.
LOSS_SCALE = {
    "loss_scale": 0,  # it changes: halved when a gradient overflows, doubled after a window without
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
}


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSettings:
    """What ZeRO shards over the processes, and what waits in host memory."""

    stage: int = setting(2, "ZeRO stage: 1 divides optimizer states, 2 gradients too, 3 weights too")
    offload_optimizer: bool = setting(False, "keep optimizer states and float32 weights in host memory")
    offload_param: bool = setting(False, "keep the divided weights in host memory; needs stage 3")
    cpu_adam: bool | None = setting(
        None, "DeepSpeed's compiled Adam for offloaded states; null: with a GPU and a C++ compiler"
    )
    bucket_size: int = setting(200_000_000, "numbers sent at a time; smaller needs less memory")
    overlap_comm: bool = setting(True, "send gradients while the backward pass goes on")
    config_file: str | None = setting(None, "an existing deepspeed.json instead of the settings above")

    def __post_init__(self) -> None:
        """Check what needs no machine.

        Raises:
            ConfigError: no such stage, or settings contradict each other.
        """
        if self.stage not in STAGES:
            raise ConfigError(
                f"`deepspeed.stage` is {self.stage}, but ZeRO has the stages 1, 2 and 3. Without ZeRO, "
                "leave `deepspeed` out."
            )
        if self.offload_param and self.stage != 3:
            raise ConfigError(
                f"`deepspeed.offload_param` is true and `deepspeed.stage` is {self.stage}, but only stage 3 "
                "divides weights. Use `deepspeed=zero3_offload`, or leave offload_param out."
            )
        check_range("deepspeed.bucket_size", self.bucket_size, low=1)


def effective(settings: DeepSpeedSettings, *, hidden_size: int = 0) -> DeepSpeedSettings:
    """Return what decides memory: the settings, or what a configuration file has in their place.

    Args:
        settings: of a run.
        hidden_size: of its model; squared it is the bucket size that transformers fills in for "auto".

    Raises:
        ConfigError: the file cannot be used.
    """
    if settings.config_file is None:
        return settings
    zero = _read_file(Path(settings.config_file))["zero_optimization"]
    bucket = zero.get("reduce_bucket_size", FILE_BUCKET_SIZE)
    return replace(
        settings,
        stage=zero["stage"],
        bucket_size=max(1, hidden_size**2 if bucket == "auto" else int(bucket)),
        offload_optimizer=_place(zero, "offload_optimizer") != "none",
        offload_param=zero["stage"] == 3 and _place(zero, "offload_param") != "none",
    )


def _place(zero: Mapping[str, Any], name: str) -> str:
    """Return where a configuration file puts something: none, cpu or nvme."""
    found = zero.get(name) or {}
    return str(found.get("device") or "none")


def not_planned(settings: DeepSpeedSettings) -> list[str]:
    """List what a configuration file asks for and `effective` does not tell, each as ``path: value``.

    Raises:
        ConfigError: the file cannot be used.
    """
    if settings.config_file is None:
        return []
    config = _read_file(Path(settings.config_file))
    zero = config["zero_optimization"]
    found = {f"zero_optimization.{name}": zero[name] for name in zero if name.startswith(ZERO_EXTRAS)}
    for name in ("offload_optimizer", "offload_param"):
        if _place(zero, name) == "nvme":
            found[f"zero_optimization.{name}.device"] = "nvme"
    found |= {name: config[name] for name in FILE_EXTRAS if config.get(name)}
    optimizer = (config.get("optimizer") or {}).get("type", "AdamW")
    if str(optimizer).lower() not in ("adam", "adamw"):
        found["optimizer.type"] = optimizer
    return [f"{path}: {json.dumps(value)}" for path, value in found.items() if value != "auto"]


def deepspeed_config(
    settings: DeepSpeedSettings, trainer: TrainerSettings, *, precision: str, has_gpu: bool
) -> dict[str, Any]:
    """Build DeepSpeed's dictionary.

    Args:
        settings: ours; ``config_file`` replaces the others.
        trainer: batch sizes, optimizer and clipping are read.
        precision: ``no`` (float32), ``bf16`` or ``fp16``: what the engine computes in. Its optimizer keeps
            float32 weights in any case.
        has_gpu: whether training runs on GPUs.

    Returns:
        Every value given, none of them ``auto`` except those that depend on the model's width, which
        transformers fills in.

    Raises:
        ConfigError: the optimizer's states cannot be sharded; the file cannot be read or contradicts us.
        MissingExtraError: DeepSpeed is not installed.
    """
    check_installed(settings)
    check_choice("trainer.optim (with `deepspeed`)", trainer.optim, SHARDABLE)
    given = _decided_values(trainer, precision)
    if settings.config_file is not None:
        return _from_file(Path(settings.config_file), given)
    zero: dict[str, Any] = {
        "stage": settings.stage,
        "overlap_comm": settings.overlap_comm and has_gpu,  # overlaps by CUDA streams; a CPU has none
        "contiguous_gradients": True,
        "reduce_bucket_size": settings.bucket_size,
    }
    if settings.stage < 3:
        zero |= {"allgather_partitions": True, "allgather_bucket_size": settings.bucket_size}
    else:
        zero |= {
            "stage3_prefetch_bucket_size": settings.bucket_size // 10,  # DeepSpeed's proportion of the two
            "stage3_param_persistence_threshold": "auto",
        }
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": has_gpu}
    if settings.offload_param:
        zero["offload_param"] = {"device": "cpu", "pin_memory": has_gpu}
    config: dict[str, Any] = {name: value for name, value in given.items() if "." not in name}
    # Or DeepSpeed refuses PyTorch's own optimizer over offloaded states: slower, but it needs no compiler.
    config |= {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    config["bf16"] = {"enabled": precision == "bf16"}
    config["fp16"] = {"enabled": precision == "fp16", **LOSS_SCALE}
    if settings.offload_optimizer and _uses_cpu_adam(settings, trainer, has_gpu):
        parameters = {
            name.rpartition(".")[2]: value for name, value in given.items() if name.startswith("optimizer.")
        }
        config["optimizer"] = {"type": "AdamW", "params": parameters | {"torch_adam": False}}
    return config


def check_installed(settings: DeepSpeedSettings) -> None:
    """Make sure that DeepSpeed is there, without importing it.

    Raises:
        MissingExtraError: it is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtraError(f"`deepspeed` (ZeRO stage {settings.stage})", extra="deepspeed")


def _decided_values(trainer: TrainerSettings, precision: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": trainer.per_device_train_batch_size,
        "gradient_accumulation_steps": trainer.gradient_accumulation_steps,
        "gradient_clipping": trainer.max_grad_norm,
        "optimizer.params.lr": trainer.learning_rate,
        "optimizer.params.betas": [trainer.adam_beta1, trainer.adam_beta2],
        "optimizer.params.eps": trainer.adam_epsilon,
        "optimizer.params.weight_decay": trainer.weight_decay,
        "bf16.enabled": precision == "bf16",
        "fp16.enabled": precision == "fp16",
    }


def _uses_cpu_adam(settings: DeepSpeedSettings, trainer: TrainerSettings, has_gpu: bool) -> bool:
    is_adam = trainer.optim.startswith("adamw")
    if settings.cpu_adam is None:
        return is_adam and has_gpu and shutil.which("g++") is not None
    if settings.cpu_adam and not (is_adam and shutil.which("g++")):
        raise ConfigError(
            "`deepspeed.cpu_adam` is true, but that needs `trainer.optim=adamw_torch` (now "
            f"`{trainer.optim}`) and a C++ compiler (g++ {'found' if shutil.which('g++') else 'not found'}). "
            "Leave it out: PyTorch's own optimizer does the same, slower."
        )
    return settings.cpu_adam


def _from_file(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Read a deepspeed.json: "auto" takes our value, another value than ours is refused."""
    config = _read_file(path)
    for name, value in given.items():
        *parents, key = name.split(".")
        node: Any = config
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or key not in node:
            continue
        if node[key] == "auto":
            node[key] = value
        elif node[key] != value:
            raise ConfigError(
                f"`deepspeed.config_file`: {path} sets `{name}` to {node[key]}, but `{DECIDED[name]}` says "
                f'{value}. Write "auto" there, or change the setting.'
            )
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        config.setdefault(name, given[name])
    _check_total_batch(config.pop("train_batch_size", "auto"), given, path)
    for name in ("bf16", "fp16"):
        config.setdefault(name, {"enabled": given[f"{name}.enabled"]})
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def _check_total_batch(total: Any, given: dict[str, Any], path: Path) -> None:
    """Refuse a ``train_batch_size`` that does not follow from the others, where DeepSpeed only asserts."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows, steps = given["train_micro_batch_size_per_gpu"], given["gradient_accumulation_steps"]
    if total not in ("auto", rows * steps * processes):
        raise ConfigError(
            f"`deepspeed.config_file`: {path} sets `train_batch_size` to {total}, but "
            f"`trainer.per_device_train_batch_size` {rows} x `trainer.gradient_accumulation_steps` {steps} x "
            f'{processes} processes make {rows * steps * processes}. Write "auto" there, or other settings.'
        )


def _read_file(path: Path) -> dict[str, Any]:
    from glmtune.training.distributed.deepspeed_file import check_parts  # pydantic: not for `--help`

    try:
        config = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"`deepspeed.config_file` is `{path}`, which cannot be read ({error.strerror}). Name an existing "
            "deepspeed.json, or leave it out and choose `deepspeed=zero2` or `zero3`."
        ) from error
    except (ValueError, RecursionError) as error:  # the latter: brackets nested by the thousand
        raise ConfigError(f"`deepspeed.config_file`: {path} is no JSON: {error}. Correct it.") from error
    if isinstance(config, dict):  # null leaves a key to its default, and DeepSpeed does not always know that
        config = {name: value for name, value in config.items() if value is not None}
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in STAGES:
        raise ConfigError(
            f"`deepspeed.config_file`: {path} has `zero_optimization.stage` {stage}, but it must be 1, 2 or "
            "3. Set it in the file, or, to train without ZeRO, leave `deepspeed` out."
        )
    check_parts(config, path)
    scheduler = config.get("scheduler")
    if _is_auto(scheduler):
        LOGGER.warning(
            "%s: its `scheduler` leaves all values to the run, so the schedule is that of "
            "`trainer.lr_scheduler_type` and `trainer.warmup_steps`.", path,
        )  # fmt: skip
        del config["scheduler"]
    elif scheduler is not None:
        raise ConfigError(
            f"`deepspeed.config_file`: {path} has a `scheduler`, but the schedule is that of "
            "`trainer.lr_scheduler_type` and `trainer.warmup_steps`. Remove it from the file."
        )
    return config


def _is_auto(scheduler: Any) -> bool:
    """Say whether a ``scheduler`` decides nothing: "auto", or a kind whose parameters all are."""
    if not isinstance(scheduler, dict):
        return scheduler == "auto"
    values = scheduler.get("params")
    return isinstance(values, dict) and bool(values) and all(value == "auto" for value in values.values())
