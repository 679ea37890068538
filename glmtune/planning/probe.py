"""Time of a step, measured: two steps of the very work on the device that is there, with random weights."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtune.errors import ConfigError
from glmtune.planning.check import Plan
from glmtune.planning.estimate import GIB
from glmtune.planning.geometry import Geometry
from glmtune.planning.workload import Workload

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CONTEXT_TOKENS = 2
"""Tokens in front of the answer that tell ChatGLM-6B where its context ends."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What two steps showed.

    Attributes:
        device: where they ran.
        pass_seconds: a forward and backward pass of one batch.
        update_seconds: the optimizer's step.
        tokens: of that batch.
        step_seconds: of an optimizer step, all its passes.
        peak_bytes: allocated on the GPU at most; None on a CPU.
    """

    device: str
    pass_seconds: float
    update_seconds: float
    tokens: int
    step_seconds: float
    peak_bytes: int | None


def measure_steps(plan: Plan, *, length: int | None = None) -> Probe:
    """Do two steps, the first of which warms up, and time the second.

    Weights are random, so nothing has to be downloaded; how fast a step is does not depend on their values.
    One process works on one device, without DeepSpeed.

    Args:
        plan: of the run; its device must be this machine's.
        length: tokens of every row, such as the mean of a data set; None: the longest.

    Raises:
        ConfigError: the work would not fit on the device.
    """
    import torch

    from glmtune.memory import device_name, peak_bytes

    work = plan.work
    if not plan.fits or work.sharding.stage or work.sharding.fsdp:
        needed, there = plan.estimate.device.total / GIB, plan.hardware.device_bytes / GIB
        reason = (
            "it runs without DeepSpeed and FSDP"
            if plan.fits
            else f"it needs {needed:.1f} GiB and there are {there:.1f}"
        )
        raise ConfigError(
            f"`probe` is true, but two steps of this setting cannot be tried here: {reason}. Leave `probe` "
            "out, or take a setting that fits on one device."
        )
    device = torch.device(work.device)
    model = _model(work).to(device).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = _optimizer(work, weights)
    batch = _batch(work, device, length or work.batch.length)
    # The first step allocates, compiles kernels and makes the optimizer's states; only the second is typical.
    _step(work, model, optimizer, batch)
    passing, updating = _step(work, model, optimizer, batch)
    peak = peak_bytes(device) if device.type != "cpu" else None
    return Probe(
        device=device_name(device),
        pass_seconds=passing,
        update_seconds=updating,
        tokens=batch["input_ids"].numel(),
        step_seconds=passing * work.passes_per_step + updating,
        peak_bytes=peak,
    )


def _step(
    work: Workload, model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> tuple[float, float]:
    """Do one pass and one update; return the seconds of each."""
    start = _now(work)
    with _autocast(work):
        loss = model(**batch, labelled_only=True).loss
    loss.backward()
    middle = _now(work)
    optimizer.step()
    optimizer.zero_grad()
    return middle - start, _now(work) - middle


def _now(work: Workload) -> float:
    import torch

    from glmtune.memory import synchronize

    synchronize(torch.device(work.device))  # kernels run behind: without it only their launch would be timed
    return time.perf_counter()


def _autocast(work: Workload) -> AbstractContextManager[Any]:
    import torch

    return torch.autocast(work.device, torch.bfloat16) if work.autocast else nullcontext()


def official_values(geometry: Geometry) -> dict[str, Any]:
    """Return the content of a config.json with these sizes: official, but for what it cannot say."""
    if geometry.mixture is not None:
        raise ConfigError(
            f"`probe` times a model with random weights, but `{geometry.name}` is a mixture of experts: its "
            "time depends on which experts are chosen. Leave `probe` out."
        )
    if geometry.num_norms == 4 or (geometry.is_tied and not geometry.is_first):
        return _transformers_values(geometry)
    sizes: dict[str, Any] = {
        "hidden_size": geometry.hidden_size,
        "num_layers": geometry.num_layers,
        "num_attention_heads": geometry.num_heads,
    }
    if geometry.is_first:
        names = ("mask_token_id", "gmask_token_id", "bos_token_id", "eos_token_id")
        special = {name: geometry.vocab_size - 4 + place for place, name in enumerate(names)}
        inner = {"inner_hidden_size": geometry.mlp_size, "vocab_size": geometry.vocab_size}
        return sizes | inner | special | {"pad_token_id": 3, "max_sequence_length": 2048}
    return sizes | {
        "ffn_hidden_size": geometry.mlp_size,
        "kv_channels": geometry.head_dim,
        "multi_query_attention": True,
        "multi_query_group_num": geometry.num_kv_heads,
        "padded_vocab_size": geometry.vocab_size,
        "seq_length": 32768,
        "add_qkv_bias": geometry.qkv_bias,
    }


def _transformers_values(geometry: Geometry) -> dict[str, Any]:
    return {
        "model_type": "glm4" if geometry.num_norms == 4 else "glm",
        "hidden_size": geometry.hidden_size,
        "intermediate_size": geometry.mlp_size,
        "head_dim": geometry.head_dim,
        "num_hidden_layers": geometry.num_layers,
        "num_attention_heads": geometry.num_heads,
        "num_key_value_heads": geometry.num_kv_heads,
        "vocab_size": geometry.vocab_size,
        "max_position_embeddings": 32768,
        "attention_bias": geometry.qkv_bias,
        "tie_word_embeddings": geometry.is_tied,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def _model(work: Workload) -> nn.Module:
    """Build the model with random weights, quantized and adapted as the run would."""
    import torch

    from glmtune.models.checkpoints.config import native_config
    from glmtune.models.checkpoints.quantized_layout import INT8_EMBEDDINGS
    from glmtune.models.load import build_model
    from glmtune.models.releases.families import Family
    from glmtune.prefix.attach import attach_prefix, freeze_base
    from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
    from glmtune.quantization.arithmetic.methods import method_named
    from glmtune.quantization.layers.apply import quantize_model
    from glmtune.quantization.layers.embeddings import round_embeddings
    from glmtune.training.adapt import tune_adapter

    geometry = work.geometry
    family = Family.CHATGLM if geometry.is_first else Family.CHATGLM2
    config = native_config(official_values(geometry), family)
    config.dtype = dtype = torch.float32 if work.weight_bytes == 4 else torch.bfloat16
    model = build_model(config)
    model._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    if work.method is not None:  # calibrated methods are stored as the plain ones of their bits
        method = method_named(work.method)
        name = f"int{method.bits}" if method.calibrated else work.method
        quantize_model(model, name, embeddings=geometry.is_first and work.embeddings == work.method)
    if work.embeddings == INT8_EMBEDDINGS:
        round_embeddings(model)
    if work.prefix is not None:
        encoder = PrefixEncoder(
            prefix_shape(config),
            pre_seq_len=work.prefix.pre_seq_len,
            hidden_size=geometry.hidden_size if work.prefix.prefix_projection else None,
            embedding_width=geometry.hidden_size if geometry.is_first else None,
            num_gates=geometry.num_heads if work.prefix.gate else None,
            dropout=work.prefix.dropout,
        )
        attach_prefix(model, encoder)
        freeze_base(model)
    model.config.use_cache = False
    if work.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return tune_adapter(model, work.lora).model if work.lora is not None else model


def _batch(work: Workload, device: torch.device, length: int) -> dict[str, Tensor]:
    """Make rows of random tokens, their answer at the end; if rows are padded, the last one is shorter."""
    import torch

    rows, vocab = work.batch.rows, work.geometry.vocab_size
    ids = torch.randint(4, vocab - 8, (rows, length), device=device)
    labels, mask = ids.clone(), torch.ones_like(ids)
    context = max(CONTEXT_TOKENS, length - work.batch.num_labels // rows)
    labels[:, :context] = -100
    if work.geometry.is_first:
        ids[:, context - 2], ids[:, context - 1] = vocab - 3, vocab - 2
    if work.batch.is_padded:
        mask[-1, -1], labels[-1, -1] = 0, -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _optimizer(work: Workload, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    import torch

    if work.optim == "sgd":
        return torch.optim.SGD(weights, lr=1e-4)
    if work.optim == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(weights, lr=1e-4, scale_parameter=False, relative_step=False)
    return torch.optim.AdamW(weights, lr=1e-4, fused=True if work.optim == "adamw_torch_fused" else None)
