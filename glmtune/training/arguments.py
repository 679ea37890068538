"""From our settings to `TrainingArguments`, and the checks that need to know the machine."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from glmtune.errors import ConfigError, MissingExtraError
from glmtune.memory import WITH_OWN_MEMORY
from glmtune.tracking.services import run_name
from glmtune.training.distributed.deepspeed_engine import leave_unimported
from glmtune.training.settings import METRICS, OPTIMIZERS, TrainerSettings

# Renamed within transformers 5; the older name warns where the newer one exists.
_NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"
)


def compute_precision(
    settings: TrainerSettings, *, tune: str, dtype: torch.dtype, device: str, zero: bool = False
) -> str:
    """Decide what autocast does: ``no`` (compute in the weights' dtype), ``bf16`` or ``fp16``.

    Args:
        settings: ``precision`` is read.
        tune: ``prefix``, ``full`` or ``lora``.
        dtype: of the base weights as loaded.
        device: kind of the device, such as ``cpu`` or ``cuda``.
        zero: under DeepSpeed, whose engine casts all weights (and keeps float32 ones for the optimizer);
            ``no`` is float32 then.

    Raises:
        ConfigError: fp16 (under DeepSpeed a float16 base too) without a GPU, or fp32 over weights loaded in
            another type.
    """
    if settings.precision == "fp16" and device not in WITH_OWN_MEMORY:  # accelerate scales losses on these
        place = "the CPU" if device == "cpu" else device.upper()
        raise ConfigError(
            f"`trainer.precision` is `fp16`, but that needs a GPU and training runs on {place}. "
            "Use `trainer.precision=bf16`, or `auto`."
        )
    if settings.precision == "fp32" and tune != "full" and dtype != torch.float32:
        raise ConfigError(
            "`trainer.precision` is `fp32`, but the frozen base was loaded in "
            f"{str(dtype).removeprefix('torch.')}. Add `model.dtype=float32`, or use "
            "`trainer.precision=auto`."
        )
    if settings.precision == "auto":
        if zero and tune != "full":
            if dtype == torch.float16 and device == "cpu":
                raise ConfigError(
                    "`model.dtype` is `float16`, in which DeepSpeed would compute, but that needs a GPU and "
                    "training runs on the CPU. Use `model.dtype=bfloat16`, or float32."
                )
            return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
        # Full tuning holds float32 weights, so it gains from bf16 products; a frozen base is in its dtype
        # already.
        # MPS computes what it is given: nobody has measured there that autocast gains anything.
        gains = device in WITH_OWN_MEMORY and getattr(torch, device).is_bf16_supported()
        return "bf16" if tune == "full" and gains else "no"
    return "no" if settings.precision == "fp32" else settings.precision


def rows_per_step(settings: TrainerSettings) -> int:
    """Return the rows of one optimizer step, over all processes.

    Args:
        settings: of the trainer.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return settings.per_device_train_batch_size * settings.gradient_accumulation_steps * processes


def training_arguments(
    settings: TrainerSettings,
    *,
    output_dir: Path,
    seed: int,
    device: str,
    autocast: str,
    evaluates: bool,
    deepspeed: dict[str, Any] | None = None,
    timeout_seconds: int = 1800,
) -> TrainingArguments:
    """Translate the settings.

    Args:
        settings: ours.
        output_dir: the run folder.
        seed: of everything random.
        device: kind of the device, such as ``cpu`` or ``cuda``.
        autocast: see ``compute_precision``.
        evaluates: whether there are rows to evaluate on.
        deepspeed: its dictionary, see ``glmtune.training.distributed.deepspeed_settings``.
        timeout_seconds: how long processes wait for each other.

    Raises:
        ConfigError: the optimizer needs a GPU.
        MissingExtraError: the optimizer's package is not installed.
    """
    _check_optimizer(settings.optim, device)
    leave_unimported()
    # The reentrant form of checkpointing finds no gradient where a layer's input has none: a frozen base with
    # a prefix.
    checkpointing: dict[str, Any] = {
        CHECKPOINTING: settings.gradient_checkpointing,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
    }
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=settings.max_steps or -1,  # -1: the epochs decide
        num_train_epochs=settings.num_train_epochs or 1.0,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=settings.per_device_eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps or settings.warmup_ratio,  # below 1 it is a share of all steps
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        max_grad_norm=settings.max_grad_norm,
        bf16=autocast == "bf16",
        fp16=autocast == "fp16",
        **checkpointing,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,  # it would show the mean of earlier losses in place of a NaN
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_steps or settings.save_steps,
        save_strategy="steps",  # its limit on checkpoints stays unset: `remove_oldest` keeps to ours
        save_steps=settings.save_steps,
        metric_for_best_model=settings.metric_for_best_model,
        greater_is_better=METRICS[settings.metric_for_best_model],
        include_num_input_tokens_seen="non_padding",  # trackers are sent the count
        dataloader_num_workers=settings.dataloader_num_workers,
        remove_unused_columns=False,  # our collators take what they need
        label_names=["labels"],
        ddp_find_unused_parameters=False,  # all trained ones are used; looking costs a pass over the graph
        use_cpu=device == "cpu",
        deepspeed=deepspeed,
        ddp_timeout=timeout_seconds,
        seed=seed,
        disable_tqdm=True,
        report_to=[],  # the session starts trackers, with all settings: see `tracking.trackers`
        run_name=run_name(output_dir),
    )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        _ = arguments.device  # decided on first use
        arguments._n_gpu = min(arguments._n_gpu, 1)  # several GPUs are for torchrun, not for DataParallel
    return arguments


def _check_optimizer(name: str, device: str) -> None:
    package = OPTIMIZERS[name]
    if name.startswith("paged_") and device != "cuda":
        other = "adamw_bnb_8bit" if name.endswith("_8bit") else "adamw_torch"
        place = "the CPU" if device == "cpu" else device.upper()
        raise ConfigError(
            f"`trainer.optim` is `{name}`, whose moments move between a CUDA GPU and the host, but training "
            f"runs on {place}. Use `trainer.optim={other}`."
        )
    if package is not None and importlib.util.find_spec(package) is None:
        raise MissingExtraError(f"`trainer.optim={name}` (of {package})", extra="optimizers")
