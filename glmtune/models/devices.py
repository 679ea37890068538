"""Which device a model goes to, and in which floating type it computes there."""

from __future__ import annotations

import re
from typing import Any

import torch

from glmtune.errors import ConfigError
from glmtune.models.settings import ACCELERATORS, DEVICE, DEVICE_RULE, DTYPES
from glmtune.settings import check_choice

SMALL_MODEL_PARAMETERS = 1_000_000_000
"""Below this many, float16 checkpoints run in float32 on a CPU; above, in bfloat16: there float32 would take
twice the file's size, 25 GB for 6B."""
MPS_BFLOAT16_MACOS = (14, 0)
"""The first system whose Metal computes in bfloat16."""


SAVED_RANDOM_STATES = ("cuda", "npu")
"""Accelerators whose random state is in checkpoints of transformers' trainer (5.x)."""


def choose_device(device: str | torch.device | None) -> torch.device:
    """Turn a setting into a device that exists.

    Args:
        device: torch device, its name, or None / "auto": the first kind of `ACCELERATORS` that is there, else
            the CPU.

    Raises:
        ConfigError: not a device, or one that this machine does not have.
    """
    if device is None or device == "auto":
        return torch.device(next((kind for kind in ACCELERATORS if count_devices(kind)), "cpu"))
    if not re.fullmatch(DEVICE, str(device)):
        raise ConfigError(f"`model.device` is `{device}`, but it must be {DEVICE_RULE}.")
    kind, _, index = str(device).partition(":")
    if kind != "cpu" and int(index or 0) >= (count := count_devices(kind)):
        raise ConfigError(
            f"`model.device` is `{device}`, but PyTorch sees {count} {ACCELERATORS[kind]} devices here. "
            "Use `model.device=cpu`, or `auto`, or install a PyTorch build for your device."
        )
    return torch.device(device)


def training_device(device: str) -> torch.device:
    """Turn ``model.device`` into the device that trains.

    ``auto`` takes an accelerator only where checkpoints hold the state of its random numbers
    (`SAVED_RANDOM_STATES`): a run on XPU or MPS would go on after a resume with other numbers (LoRA's dropout
    draws some), and what trains unasked must not do that. Named, these train as well.

    Args:
        device: the setting.

    Raises:
        ConfigError: see `choose_device`.
    """
    if device != "auto":
        return choose_device(device)
    return torch.device(next((kind for kind in SAVED_RANDOM_STATES if count_devices(kind)), "cpu"))


def list_devices() -> list[torch.device]:
    """Return the accelerators of this machine, each with its number."""
    return [torch.device(kind, index) for kind in ACCELERATORS for index in range(count_devices(kind))]


def count_devices(kind: str) -> int:
    """Return how many devices of a kind there are; a kind that this PyTorch was not built for has none."""
    module: Any = getattr(torch, kind, None)
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return module.device_count() if module is not None and module.is_available() else 0


def choose_dtype(
    dtype: str | torch.dtype | None,
    device: torch.device,
    *,
    stored: str | torch.dtype | None,
    num_parameters: int,
) -> torch.dtype:
    """Turn a setting into the floating type to load.

    Args:
        dtype: torch type, its name, or None / "auto": the checkpoint's own where the device runs it well. On
            a CPU float16 becomes float32 or, in a large model, bfloat16; on a device without bfloat16 that
            becomes float16.
        device: where the model will run.
        stored: the checkpoint's own type.
        num_parameters: of the model; decides what float16 becomes on a CPU.

    Raises:
        ConfigError: not one of float32, bfloat16, float16; bfloat16 where the device does not compute in it.
    """
    if dtype is not None and dtype != "auto":
        name = str(dtype).removeprefix("torch.")
        check_choice("model.dtype", name, DTYPES)
        if name == "bfloat16" and not has_bfloat16(device):
            raise ConfigError(
                f"`model.dtype` is `bfloat16`, but this {ACCELERATORS[device.type]} device does not compute "
                "in it. Use `float16`, or `auto`."
            )
        return getattr(torch, name)
    own = getattr(torch, str(stored or torch.float32).removeprefix("torch."))
    if device.type == "cpu" and own == torch.float16:
        return torch.float32 if num_parameters < SMALL_MODEL_PARAMETERS else torch.bfloat16
    return torch.float16 if own == torch.bfloat16 and not has_bfloat16(device) else own


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; CPUs and every CUDA GPU do, the older ones slowly."""
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(*MPS_BFLOAT16_MACOS)
    if device.type in ("npu", "xpu"):
        module: Any = getattr(torch, device.type)
        return bool(getattr(module, "is_bf16_supported", lambda: True)())
    return True
