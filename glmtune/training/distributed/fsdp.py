"""FSDP2, PyTorch's own way of dividing weights among processes, with checkpoints as those of one process.

Layers are divided one by one and gathered while they compute; what lies outside them (embedding, head,
prefix) stays gathered from forward to backward pass. Checkpoints hold whole tensors in the plain format, so a
run may go on with any number of processes, one included, with FSDP or without.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from glmtune.models.placeholders import is_placeholder, pending_weights
from glmtune.training.distributed.sharded_loading import fill

OPTIMIZER_FILE = "optimizer.pt"


def divide(model: nn.Module, device: torch.device) -> None:
    """Divide a model's weights among the processes of this run.

    Args:
        model: mutated; its parameters become `DTensor`. Each process holds all of them now, or the model is
            of placeholders, and every tensor is divided as process 0 reads it.
        device: where the parts will be.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    is_pending = pending_weights(model) is not None
    if is_pending:
        _move_to_meta(model)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model._is_fsdp_managed_module = True  # pyright: ignore[reportArgumentType]  # what transformers asks for
    if is_pending:
        model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
        fill(model, _keep_part, device=device)


def _move_to_meta(model: nn.Module) -> None:
    """Put the pending weights of a model of placeholders on the device that FSDP takes them from."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if is_placeholder(weight):
                empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
                moved.setdefault(id(weight), nn.Parameter(empty, requires_grad=weight.requires_grad))
                setattr(module, name, moved[id(weight)])


def _keep_part(weight: nn.Parameter, whole: Tensor) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    torch.distributed.broadcast(whole, 0)
    assert isinstance(weight, DTensor)
    part = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.to_local().copy_(part.to_local())


def whole_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Put the trained weights together; every process must call this.

    Args:
        model: divided.
        keep: whether this process wants them; the others get nothing.

    Returns:
        Whole tensors on the host by parameter name, tied ones under each of their names.
    """
    named = model.named_parameters(remove_duplicate=False)
    return _whole({name: weight for name, weight in named if weight.requires_grad}, keep=keep)


def whole_optimizer(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """Put the optimizer's state together as one process would have it; every process must call this.

    Args:
        optimizer: over divided weights.
        keep: whether this process wants it; the others only take part.
    """
    state = optimizer.state_dict()
    state["state"] = {number: _whole(values, keep=keep) for number, values in state["state"].items()}
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take over an optimizer's state, of which every process keeps its part; every process must call this.

    Args:
        optimizer: over divided weights; mutated.
        folder: of a checkpoint written with FSDP or by one process.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    state = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True, mmap=True)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, values in state["state"].items():
        weight = weights[number]
        for name, value in values.items():
            if isinstance(weight, DTensor) and isinstance(value, Tensor) and value.shape == weight.shape:
                moved = value.to(weight.device)
                values[name] = distribute_tensor(moved, weight.device_mesh, weight.placements)
    optimizer.load_state_dict(state)


def _whole(values: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for name, value in values.items():
        gather: Callable[[], Tensor] | None = getattr(value, "full_tensor", None)
        full = value if gather is None else gather()
        if keep:
            whole[name] = full.detach().cpu() if isinstance(full, Tensor) else full
    return whole
