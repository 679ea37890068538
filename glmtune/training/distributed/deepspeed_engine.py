"""DeepSpeed's engine behind one door: starting it, and the weights and optimizer states that ZeRO shards."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from glmtune.errors import ConfigError
from glmtune.training.distributed.deepspeed_settings import DeepSpeedSettings, check_installed

if TYPE_CHECKING:
    from torch import Tensor, nn

# Read from and set on the scaler itself: in DeepSpeed 0.19 `DynamicLossScaler` has no state_dict.
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic loss scale remembers."""


def prepare(settings: DeepSpeedSettings, device: str) -> None:
    """Load DeepSpeed for a device, without its compiled shared-memory collectives: gloo does the same.

    Args:
        settings: named in the error.
        device: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: the device is neither: DeepSpeed is set up for no other here.
        MissingExtraError: DeepSpeed is not installed.
    """
    if device not in ("cpu", "cuda"):
        raise ConfigError(
            f"`deepspeed` is given and `model.device` is {device.upper()}, but DeepSpeed runs on CUDA GPUs "
            "or on the CPU only. Leave `deepspeed` out, or add `model.device=cpu`."
        )
    check_installed(settings)
    os.environ.setdefault("DS_ACCELERATOR", device)
    # accelerate warns that `gradient_accumulation_steps` differs from that of its plug-in, which
    # transformers' trainer leaves at 1, since it accumulates itself.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that PyTorch is about to change: nothing to us or to users.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    import deepspeed

    for name in deepspeed.ops.__compatible_ops__:
        if "shm_comm" in name:
            deepspeed.ops.__compatible_ops__[name] = False


def leave_unimported() -> None:
    """Keep accelerate from importing DeepSpeed where nothing uses it, which takes half a second.

    `Trainer.__init__` unwraps its model, and `accelerate.utils.other.extract_model_from_parallel` (1.15)
    imports DeepSpeed wherever it is installed, to ask whether the model is one of its engines. No model is
    while nobody has imported it, so that asking for this instead changes no answer.
    """
    from accelerate.utils import other

    other.is_deepspeed_available = lambda: "deepspeed" in sys.modules


def shard_parameter(parameter: nn.Parameter, config: Mapping[str, Any], like: nn.Parameter | None) -> None:
    """Leave each process its shard of a parameter, as stage 3 does; the values are those of process 0.

    Args:
        parameter: whole, in the type the engine computes in; all processes must take part.
        config: the dictionary that the engine will get.
        like: a parameter sharded before, None for the first one.
    """
    # DeepSpeed shards a whole model by `zero.Init`, which reads the dictionary and sets up its groups. What
    # it leaves on the first parameter, a method, shards every later one alone: a model of one parameter at a
    # time.
    if like is None:
        import deepspeed
        from torch import nn

        deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=dict(config))
    else:
        cast("Any", like).convert_to_zero_parameters([parameter])


def scale_is_exhausted(error: Exception) -> bool:
    """Tell whether DeepSpeed gave up in fp16, because gradients are not finite at the smallest loss scale.

    It raises a plain Exception, so only its words tell it apart.
    """
    return "loss scale already at minimum" in str(error)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of what is trained, in an order that is the same in every process."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter, sharded or not: ZeRO-3 leaves it empty, with a note of its shape."""
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
    # Names with a dot are not of the optimizer's states per weight: `group.step`, `scaler.cur_scale`, ...
    plain = {name: value for name, value in values.items() if "." not in name}
    # torch's own optimizers count steps in a tensor, DeepSpeed's compiled Adam in a number.
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
    """Let ZeRO 1 and 2 find each parameter's states; by itself it links those of the first group only.

    DeepSpeed (0.19) links at the end of the first group's first step, when the next groups have no states
    yet, and takes all for linked from then on. Biases and norms, without weight decay, are such a next group.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _inner(engine: Any) -> Any:
    """Return the optimizer that ZeRO wraps."""
    return engine.optimizer.optimizer


def _flat_partitions(optimizer: Any) -> list[Tensor]:
    """Return this process's shards of the float32 weights, flat: what the inner optimizer updates."""
    for name in (
        "fp32_partitioned_groups_flat",  # stage 3
        "single_partition_of_fp32_groups",  # stages 1 and 2
        "fp32_groups_flat_partition",  # its optimizer for bf16 (bf16_optimizer.py)
    ):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise AssertionError(f"{type(optimizer).__name__} is no ZeRO optimizer that we know")


def _is_per_weight(value: Any) -> bool:
    return hasattr(value, "numel") and value.dim() > 0


def get_full(parameter: nn.Parameter, state: str | None) -> Tensor:
    """Gather a sharded float32 weight, or one of its optimizer states; all processes must take part.

    Args:
        parameter: a trained one.
        state: name of a state; None is the weight itself.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if state is None:
        return cast("Tensor", safe_get_full_fp32_param(parameter))
    return cast("Tensor", safe_get_full_optimizer_state(parameter, state))


def set_full(parameter: nn.Parameter, state: str | None, value: Tensor) -> None:
    """Store this process's shard of a full float32 weight, or of an optimizer state."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if state is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, state)
