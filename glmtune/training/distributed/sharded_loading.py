"""Sharded loading: give a model of placeholders its weights, of which every process keeps its shards only.

    files  --tensor by tensor-->  process 0  --broadcast-->  all processes  --each keeps-->  its shard

Process 0 reads. So a process never holds more than its shards and what was stored as one tensor (in the head
or embedding of a large vocabulary that is the most), and the files are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from glmtune.memory import trim_memory
from glmtune.models.load import GlmModel
from glmtune.models.placeholders import pending_weights, set_pending_weights
from glmtune.training.distributed import collectives, deepspeed_engine


def base_fingerprint(model: GlmModel) -> str:
    """Return a base's fingerprint; where the model has placeholders, process 0 makes it of the files.

    Args:
        model: one with placeholders remembers what was found, as its weights will soon be sharded.

    Raises:
        CheckpointError: in every process, the files cannot be read.
    """
    pending = pending_weights(model)
    if pending is None:
        return model.fingerprint()
    found = collectives.broadcast_from_main(pending.fingerprint)
    model.fingerprint = lambda: found
    return found


def load_sharded(
    model: nn.Module,
    keep: Callable[[nn.Parameter, Tensor], None],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> None:
    """Read the weights behind a model's placeholders; every process must call this.

    Args:
        model: of placeholders; adapters or a prefix, which are real, may be in it.
        keep: given a parameter and its whole tensor, with values in process 0 only; all processes call it.
        device: where the whole tensors are.
        dtype: of the whole tensors; None: of their parameters.

    Raises:
        CheckpointError: in process 0, the files cannot be read.
    """
    pending = pending_weights(model)
    assert pending is not None
    named = model.named_parameters(remove_duplicate=False)
    parameters = {_base_name(name): parameter for name, parameter in named}
    reads = collectives.is_main_process()

    # `PendingWeights.read` enters this once per stored tensor (several parameters, where they were stored
    # fused), in the same order in every process, so that the broadcasts inside `keep` match.
    @contextmanager
    def whole_tensors(names: Sequence[str]) -> Generator[Sequence[Tensor] | None]:
        wanted = [parameters[name] for name in names]
        whole = [torch.empty(weight.shape, dtype=dtype or weight.dtype, device=device) for weight in wanted]
        yield whole if reads else None
        for weight in wanted:
            keep(weight, whole.pop(0))  # popped, so that each is freed before the next one is sharded
        trim_memory()

    with torch.no_grad():
        pending.read(whole_tensors)
    set_pending_weights(model, None)


def load_sharded_for_zero(model: nn.Module, args: TrainingArguments) -> None:
    """Read the weights behind a model's placeholders as ZeRO-3 shards them; every process must call this.

    What is trained is cast to the type that the engine computes in, as the engine would.

    Args:
        model: an engine is made of it next; one without placeholders stays as it is.
        args: with DeepSpeed's dictionary.
    """
    if pending_weights(model) is None:
        return
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    config: Mapping[str, Any] = cast(Any, args.hf_deepspeed_config).config
    device = args.device
    sharded: list[nn.Parameter] = []

    def keep(weight: nn.Parameter, whole: Tensor) -> None:
        weight.data = whole
        deepspeed_engine.shard_parameter(weight, config, sharded[0] if sharded else None)
        sharded.append(weight)

    load_sharded(model, keep, device=device, dtype=dtype)
    done = {id(weight) for weight in sharded}
    for weight in model.parameters():
        if id(weight) not in done:
            weight.data = weight.data.to(dtype)
    for module in model.modules():  # the engine moves no model that is sharded already
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _base_name(name: str) -> str:
    """Return the name that a weight has without PEFT around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")
