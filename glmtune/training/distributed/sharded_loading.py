"""Give a hollow model its weights, tensor by tensor, of which every process keeps its part only.

Process 0 reads. So a process never holds more than its part and what was stored as one tensor (in the head or
embedding of a large vocabulary that is the most), and the files are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glmtune.memory import trim_memory
from glmtune.models.load import GlmModel
from glmtune.models.placeholders import wait_for, waits_for
from glmtune.training.distributed import collectives, deepspeed_engine


def fingerprint(model: GlmModel) -> str:
    """Return a base's fingerprint, a hollow one's from its files, which process 0 reads for it.

    Args:
        model: a hollow one remembers it.

    Raises:
        CheckpointError: in every process, the files cannot be read.
    """
    stored = waits_for(model)
    if stored is None:
        return model.fingerprint()
    found: str = collectives.of_first(stored.fingerprint)
    model.fingerprint = lambda: found
    return found


def fill(
    model: nn.Module,
    keep: Callable[[nn.Parameter, Tensor], None],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> None:
    """Read the weights that a model waits for; every process must call this.

    Args:
        model: hollow; adapters or a prefix, which are real, may be in it.
        keep: given a parameter and its whole tensor, with values in process 0 only; all processes call it.
        device: where the whole tensors are.
        dtype: of the whole tensors; None: of their parameters.

    Raises:
        CheckpointError: in process 0, the files cannot be read.
    """
    stored = waits_for(model)
    assert stored is not None
    named = model.named_parameters(remove_duplicate=False)
    parameters = {_base_name(name): parameter for name, parameter in named}
    reads = collectives.is_first()

    @contextmanager
    def passing(names: Sequence[str]) -> Iterator[Sequence[Tensor] | None]:
        wanted = [parameters[name] for name in names]
        whole = [torch.empty(weight.shape, dtype=dtype or weight.dtype, device=device) for weight in wanted]
        yield whole if reads else None
        for weight in wanted:
            keep(weight, whole.pop(0))
        trim_memory()

    with torch.no_grad():
        stored.fill(model, passing)
    wait_for(model, None)


def fill_for_zero(
    model: nn.Module, config: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype
) -> None:
    """Read the weights that a model waits for, divided as ZeRO-3 wants them; every process must call this.

    Args:
        model: hollow; an engine is made of it next.
        config: DeepSpeed's dictionary.
        device: where the engine computes.
        dtype: that it computes in; what is trained is cast as well, as the engine would.
    """
    divided: list[nn.Parameter] = []

    def keep(weight: nn.Parameter, whole: Tensor) -> None:
        weight.data = whole
        deepspeed_engine.divide(weight, config, divided[0] if divided else None)
        divided.append(weight)

    fill(model, keep, device=device, dtype=dtype)
    done = {id(weight) for weight in divided}
    for weight in model.parameters():
        if id(weight) not in done:
            weight.data = weight.data.to(dtype)
    for module in model.modules():  # the engine leaves a divided model where it is
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _base_name(name: str) -> str:
    """Return the name that a weight has without PEFT around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")
