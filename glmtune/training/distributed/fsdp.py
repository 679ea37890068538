"""FSDP2, PyTorch's own sharding of weights, with checkpoints as those of one process.

Each process holds a row-wise shard of every parameter, as a `DTensor`:

    model                embedding, head, prefix: gathered for the whole of forward and backward pass
      layer 0            gathered when it computes, resharded after it, gathered again for its backward pass
      layer 1            ...

So a process needs its share of all plus one whole layer at a time; the few weights outside the layers are
used at both ends of a pass, with nothing between to free them for. Checkpoints hold whole tensors in the
plain format, so a run may go on with any number of processes, one included, with FSDP or without.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from glmtune.models.placeholders import is_placeholder, pending_weights
from glmtune.training.distributed.sharded_loading import load_sharded


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model's weights over the processes of this run.

    Args:
        model: mutated; its parameters become `DTensor`. Each process holds all of them now, or they are
            placeholders, and every tensor is sharded as process 0 reads it.
        device: where the shards will be.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    has_placeholders = pending_weights(model) is not None
    if has_placeholders:
        _move_to_meta(model)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Layers before the model: `fully_shard` of a module takes what no inner module has taken already, so the
    # other order would make one group of all weights, gathered at once.
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # transformers (5.24, `is_fsdp_managed_module`) asks for this mark of a model that is sharded already.
    model._is_fsdp_managed_module = True  # pyright: ignore[reportArgumentType]
    if has_placeholders:
        # Only now do the parameters get memory, each process for its shards alone; then values come in.
        model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
        load_sharded(model, _keep_shard, device=device)


def _move_to_meta(model: nn.Module) -> None:
    """Make meta tensors of placeholders: of these FSDP makes shards without memory.

    Tied weights stay one parameter.
    """
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if is_placeholder(weight):
                empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
                moved.setdefault(id(weight), nn.Parameter(empty, requires_grad=weight.requires_grad))
                setattr(module, name, moved[id(weight)])


def _keep_shard(weight: nn.Parameter, whole: Tensor) -> None:
    """Take this process's shard of a tensor that process 0 has read."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    # After the broadcast every process holds the whole tensor, so each cuts its own shard off
    # (`src_data_rank=None`); by default rank 0 would send the shards once more.
    torch.distributed.broadcast(whole, 0)
    assert isinstance(weight, DTensor)
    shard = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.to_local().copy_(shard.to_local())


@contextmanager
def callable_in_parts(model: nn.Module) -> Generator[None]:
    """Run a block that calls the decoder stack and the head themselves, as the request engine does.

    The weights outside the layers are gathered by the forward of the whole model only, which such a block
    never calls; so they are gathered around it. Every process must run the same block.

    Args:
        model: sharded.
    """
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(model, FSDPModule)
    # Before the first forward of the whole nothing knows its outermost module, and a layer that is called by
    # itself would take itself for it. No public function (2.7 to 2.13) tells without a forward.
    model._get_fsdp_state()._lazy_init()
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def gather_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Gather the trained weights; every process must call this.

    Args:
        model: sharded.
        keep: whether this process wants them; the others get nothing.

    Returns:
        Whole tensors on the host by parameter name, tied ones under each of their names.
    """
    named = model.named_parameters(remove_duplicate=False)
    return _gather({name: weight for name, weight in named if weight.requires_grad}, keep=keep)


def gather_optimizer(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """Gather the optimizer's state as one process would have it; every process must call this.

    Args:
        optimizer: over sharded weights.
        keep: whether this process wants it; the others only take part.
    """
    state = optimizer.state_dict()
    state["state"] = {number: _gather(values, keep=keep) for number, values in state["state"].items()}
    return state


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Leave each process its shards of a loaded optimizer state; every process must call this.

    Args:
        optimizer: over sharded weights.
        state: whole, of a checkpoint written with FSDP or by one process; mutated.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, values in state["state"].items():
        weight = weights[number]
        for name, value in values.items():
            if isinstance(weight, DTensor) and isinstance(value, Tensor) and value.shape == weight.shape:
                moved = value.to(weight.device)
                values[name] = distribute_tensor(moved, weight.device_mesh, weight.placements)


def _gather(values: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for name, value in values.items():
        # `full_tensor` of a DTensor is a collective: all call it, also those that keep nothing.
        gather: Callable[[], Tensor] | None = getattr(value, "full_tensor", None)
        full = value if gather is None else gather()
        if keep:
            whole[name] = full.detach().cpu() if isinstance(full, Tensor) else full
    return whole


@contextmanager
def without_gradient_sync(model: nn.Module) -> Generator[None]:
    """Leave gradients unreduced over a block, as for all micro-batches of a step but the last.

    Args:
        model: sharded.
    """
    sharded: Any = model
    sharded.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        sharded.set_requires_gradient_sync(True)


@contextmanager
def outer_weights_gathered(model: nn.Module) -> Generator[None]:
    """Hold the weights outside the layers whole while a block calls parts of a model by themselves.

    Every process must call this.

    Args:
        model: sharded, and called as a whole before.
    """
    sharded: Any = model
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()
