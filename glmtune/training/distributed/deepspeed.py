"""DeepSpeed behind one door: its settings, the dictionary made of them, and the state that ZeRO divides."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from glmtune.errors import ConfigError, MissingExtraError
from glmtune.settings import check_choice, check_range, setting
from glmtune.training.settings import TrainerSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

STAGES = (1, 2, 3)
# Optimizers that update every number by itself, so that their states can be divided anywhere.
DIVISIBLE = ("adamw_torch", "adamw_torch_fused", "sgd")
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

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic loss scale remembers."""

LOSS_SCALE = {
    "loss_scale": 0,  # it changes: halved when a gradient overflows, doubled after a window without
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
}


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSettings:
    """What ZeRO divides among the processes, and what waits in host memory."""

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
    kind = (config.get("optimizer") or {}).get("type", "AdamW")
    if str(kind).lower() not in ("adam", "adamw"):
        found["optimizer.type"] = kind
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
        ConfigError: the optimizer cannot be divided, or the file cannot be read or contradicts a setting.
        MissingExtraError: DeepSpeed is not installed.
    """
    _check_installed(settings)
    check_choice("trainer.optim (with `deepspeed`)", trainer.optim, DIVISIBLE)
    given = _decided_values(trainer, precision)
    if settings.config_file is not None:
        return _from_file(Path(settings.config_file), given)
    zero: dict[str, Any] = {
        "stage": settings.stage,
        "overlap_comm": settings.overlap_comm and has_gpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": settings.bucket_size,
    }
    if settings.stage < 3:
        zero |= {"allgather_partitions": True, "allgather_bucket_size": settings.bucket_size}
    else:
        zero |= {
            "stage3_prefetch_bucket_size": settings.bucket_size // 10,
            "stage3_param_persistence_threshold": "auto",
        }
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": has_gpu}
    if settings.offload_param:
        zero["offload_param"] = {"device": "cpu", "pin_memory": has_gpu}
    config: dict[str, Any] = {name: value for name, value in given.items() if "." not in name}
    config |= {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    config["bf16"] = {"enabled": precision == "bf16"}
    config["fp16"] = {"enabled": precision == "fp16", **LOSS_SCALE}
    if settings.offload_optimizer and _uses_cpu_adam(settings, trainer, has_gpu):
        parameters = {
            name.rpartition(".")[2]: value for name, value in given.items() if name.startswith("optimizer.")
        }
        config["optimizer"] = {"type": "AdamW", "params": parameters | {"torch_adam": False}}
    return config


def _check_installed(settings: DeepSpeedSettings) -> None:
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
    if config.get("train_batch_size") == "auto":
        del config["train_batch_size"]  # follows from the two others and the number of processes
    for name in ("bf16", "fp16"):
        config.setdefault(name, {"enabled": given[f"{name}.enabled"]})
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def _read_file(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"`deepspeed.config_file` is `{path}`, which cannot be read ({error.strerror}). Name an existing "
            "deepspeed.json, or leave it out and choose `deepspeed=zero2` or `zero3`."
        ) from error
    except ValueError as error:
        raise ConfigError(f"`deepspeed.config_file`: {path} is no JSON: {error}. Correct it.") from error
    stage = config.get("zero_optimization", {}).get("stage") if isinstance(config, dict) else None
    if stage not in STAGES:
        raise ConfigError(
            f"`deepspeed.config_file`: {path} has `zero_optimization.stage` {stage}, but it must be 1, 2 or "
            "3. Set it in the file."
        )
    if "scheduler" in config:
        raise ConfigError(
            f"`deepspeed.config_file`: {path} has a `scheduler`, but the schedule is that of "
            "`trainer.lr_scheduler_type` and `trainer.warmup_steps`. Remove it from the file."
        )
    return config


def prepare(settings: DeepSpeedSettings, device: str) -> None:
    """Load DeepSpeed for a device, without its compiled shared-memory collectives: gloo does the same.

    Args:
        settings: named in the error.
        device: ``cpu`` or ``cuda``.

    Raises:
        MissingExtraError: DeepSpeed is not installed.
    """
    _check_installed(settings)
    os.environ.setdefault("DS_ACCELERATOR", device)
    # It compares with a plug-in that the Trainer, which accumulates itself, leaves at 1.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that PyTorch is about to change: nothing to us or to users.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    import deepspeed

    for name in deepspeed.ops.__compatible_ops__:
        if "shm_comm" in name:
            deepspeed.ops.__compatible_ops__[name] = False


def divide(parameter: nn.Parameter, config: Mapping[str, Any], like: nn.Parameter | None) -> None:
    """Leave each process its part of a parameter, as stage 3 does; the values are those of process 0.

    Args:
        parameter: whole, in the type the engine computes in; all processes must take part.
        config: the dictionary that the engine will get.
        like: a parameter divided before, None for the first one.
    """
    if like is None:
        import deepspeed
        from torch import nn

        deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=dict(config))
    else:
        cast("Any", like).convert_to_zero_parameters([parameter])


def scale_is_exhausted(error: Exception) -> bool:
    """Tell whether DeepSpeed gave up in fp16, because gradients are not finite at the smallest loss scale."""
    return "loss scale already at minimum" in str(error)


def stage_of(engine: Any) -> int:
    """Return the ZeRO stage an engine runs in."""
    return int(engine.zero_optimization_stage())


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of what is trained, in an order that is the same in every process."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter, divided or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def state_names(engine: Any) -> list[str]:
    """Return the optimizer's states that have one number per weight, such as exp_avg and exp_avg_sq.

    They exist after the first step, and are the same in every process.
    """
    _link_states(engine.optimizer)
    states = [state for state in _inner(engine).state.values() if state]
    names = states[0] if states else {}
    return sorted(name for name, value in names.items() if _is_per_weight(value))


def scalars(engine: Any) -> dict[str, float]:
    """Return the optimizer's other states, such as the step, and the loss scale, as plain numbers."""
    states = [state for state in _inner(engine).state.values() if state]
    values = states[0] if states else {}
    found = {name: float(value) for name, value in values.items() if not _is_per_weight(value)}
    group = _inner(engine).param_groups[0]
    if "step" in group:  # where DeepSpeed's fused Adam counts
        found["group.step"] = float(group["step"])
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    found |= {f"scaler.{name}": float(getattr(scaler, name)) for name in SCALER if hasattr(scaler, name)}
    return found


def allocate_states(engine: Any, names: list[str], values: Mapping[str, float]) -> None:
    """Make the optimizer's states, which a fresh optimizer only makes at its first step.

    Args:
        engine: before its first step.
        names: states with one number per weight; filled with zeros.
        values: as returned by ``scalars``.
    """
    import torch

    inner = _inner(engine)
    plain = {name: value for name, value in values.items() if "." not in name}
    counts_in_tensors = isinstance(inner, torch.optim.Optimizer) and type(inner).__module__.startswith(
        "torch."
    )
    for flat in _flat_partitions(engine.optimizer):
        state: dict[str, Any] = {name: torch.zeros_like(flat) for name in names}
        for name, value in plain.items():
            state[name] = torch.tensor(value) if counts_in_tensors else int(value)
        inner.state[flat] = state
    if "group.step" in values:
        for group in inner.param_groups:
            group["step"] = int(values["group.step"])
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for name in SCALER:
        if f"scaler.{name}" in values and hasattr(scaler, name):
            setattr(scaler, name, type(getattr(scaler, name))(values[f"scaler.{name}"]))
    _link_states(engine.optimizer)


def _link_states(optimizer: Any) -> None:
    """Let ZeRO 1 and 2 find each parameter's states; by itself it links those of the first group only."""
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _inner(engine: Any) -> Any:
    """Return the optimizer that ZeRO wraps."""
    return engine.optimizer.optimizer


def _flat_partitions(optimizer: Any) -> list[Tensor]:
    """Return this process's parts of the float32 weights, in which the inner optimizer thinks."""
    for name in (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    ):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise AssertionError(f"{type(optimizer).__name__} is no ZeRO optimizer that we know")


def _is_per_weight(value: Any) -> bool:
    return hasattr(value, "numel") and value.dim() > 0


def get_full(parameter: nn.Parameter, state: str | None) -> Tensor:
    """Put a divided float32 weight, or one of its optimizer states, together; all processes must take part.

    Args:
        parameter: a trained one.
        state: name of a state; None is the weight itself.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if state is None:
        return cast("Tensor", safe_get_full_fp32_param(parameter))
    return cast("Tensor", safe_get_full_optimizer_state(parameter, state))


def set_full(parameter: nn.Parameter, state: str | None, value: Tensor) -> None:
    """Put this process's part of a full float32 weight, or of an optimizer state, in its place."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if state is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, state)
