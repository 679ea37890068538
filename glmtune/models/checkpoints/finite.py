"""Which tensor is the first that holds a number that is none: NaN or infinity.

One such weight makes answers nonsense without an error: all logits are NaN, and the most likely token is then
the first of the vocabulary. Or it does not even show: PyTorch's attention on CPUs makes zeros of NaN queries.
So weights are looked at in full when they are read, which takes a tenth of a second per GB, outputs whenever
there are some (`check_output`), and what a run saves as good before it is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from glmtune.errors import CheckpointError, GlmtuneError

CHUNK = 2**20
"""Numbers looked at at once: few enough for the processor's cache, and for sums in float16."""


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name the first tensor that holds NaN or infinity; None if there is none.

    Args:
        tensors: name and tensor, looked at in full and in this order; integers and tensors without memory
            (meta, placeholders) have nothing to look at.
    """
    return next((name for name, tensor in tensors if _is_looked_at(tensor) and not _is_finite(tensor)), None)


def check_read(file: Path, name: str, parts: Iterable[Tensor]) -> None:
    """Refuse a weight that is not finite.

    Args:
        file: where it was read, for the message.
        name: as it is called there.
        parts: what was made of it.

    Raises:
        CheckpointError: a number is not finite.
    """
    for part in parts:
        if first_not_finite([(name, part)]) is None:
            continue
        dtype = str(part.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{file}: tensor {name}, read as {dtype}, holds numbers that are not finite (NaN or infinity), "
            "which would make every answer nonsense. The file is damaged, was saved by a run that had "
            "diverged (take an earlier checkpoint), or its numbers are too large for float16 (`model.dtype="
            "bfloat16`)."
        )


def check_savable(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse to save what a run has made useless: nobody shall go on from it as the last good checkpoint.

    Args:
        folder: where it was to be saved, for the message.
        tensors: name and tensor of what was trained, looked at in full.

    Raises:
        CheckpointError: with the name of the first one.
    """
    name = first_not_finite(tensors)
    if name is not None:
        raise CheckpointError(
            f"Nothing is saved to `{folder}`: {name} holds numbers that are not finite (NaN or infinity), so "
            "training has diverged. What was saved before is kept; go on from there with a smaller "
            "`trainer.learning_rate`, or more `trainer.warmup_steps`."
        )


def check_output(model: nn.Module, output: Tensor) -> None:
    """Stop where a model's output is not finite, with the name of the first weight that is not.

    Args:
        model: which computed it; with all that is attached to it.
        output: logits or losses. Its sum is looked at first, in one pass over it: it is finite unless a
            number in it is not, or numbers are near the largest there are.

    Raises:
        CheckpointError: a weight is not finite.
        GlmtuneError: all weights are, so numbers became too large on the way.
    """
    if math.isfinite(float(output.sum())) or bool(torch.isfinite(output).all()):
        return
    name = first_not_finite(_weights_of(model))
    if name is not None:
        raise CheckpointError(
            f"The model's output is not finite, as its tensor {name} holds NaN or infinity. Its file is "
            "damaged, or was saved by a run that had diverged: fetch it again, or take an earlier checkpoint."
        )
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
    raise GlmtuneError(
        "The model's output is not finite (NaN or infinity), while every weight is: on the way numbers "
        f"became too large for {str(dtype).removeprefix('torch.')}. Use a type with a larger range: "
        "`model.dtype=bfloat16` or `model.dtype=float32`."
    )


def _weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights and buffers of a model, one layer at a time."""
    for place, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        if any(tensor.is_meta for tensor in own.values()):
            own = module.state_dict()  # codes that a fast product holds in its own order come back here
        yield from ((f"{place}.{name}" if place else name, tensor) for name, tensor in own.items())


def _is_looked_at(tensor: Tensor) -> bool:
    is_placeholder = tensor.numel() > 1 and not any(tensor.stride())
    return tensor.is_floating_point() and not tensor.is_meta and not is_placeholder


def _is_finite(tensor: Tensor) -> bool:
    # A sum is finite unless a number in it is not, or the sum is too large for the type: then all are looked
    # at. It runs at the speed of memory, `isfinite` at a tenth of it.
    parts = tensor.detach().reshape(-1).split(CHUNK)
    return all(math.isfinite(float(part.sum())) or bool(torch.isfinite(part).all()) for part in parts)
