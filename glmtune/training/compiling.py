"""`torch.compile` for the layers of a model, in place: names, weights and checkpoints stay as they are."""

from __future__ import annotations

import importlib.util
import shutil

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from glmtune.errors import ConfigError


def compile_layers(model: nn.Module) -> int:
    """Have every layer compiled on first use, with lengths and batch sizes left open.

    Layers of one kind share their compiled code, so deep models compile no longer than shallow ones.

    Args:
        model: mutated.

    Returns:
        How many layers will be compiled.

    Raises:
        ConfigError: what compiling needs on this device is missing.
    """
    check_compiler(next(model.parameters()).device)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def check_compiler(device: torch.device) -> None:
    """Make sure that `torch.compile` can work here.

    Args:
        device: of the model.

    Raises:
        ConfigError: no C++ compiler (on a CPU), or no Triton (on a GPU).
    """
    if device.type == "cpu":
        missing = None if shutil.which("g++") or shutil.which("clang++") else "a C++ compiler, such as g++"
    else:
        missing = None if importlib.util.find_spec("triton") else "the package triton"
    if missing is not None:
        raise ConfigError(
            f"`trainer.torch_compile` is true, but on `{device.type}` it needs {missing}, which is not "
            "there. Install it, or leave `trainer.torch_compile` at false."
        )
