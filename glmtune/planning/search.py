"""The cheapest setting that fits: every combination of the levers of memory, by what each costs in time.

Levers that leave the batch of an optimizer step and the arithmetic of the method as they are come first; a
quantized or 16-bit base, which changes what is learnt, is considered where nothing else fits.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from glmtune.errors import ConfigError
from glmtune.planning.estimate import Estimate, estimate
from glmtune.planning.geometry import Geometry
from glmtune.planning.hardware import Hardware
from glmtune.planning.workload import workload_of
from glmtune.training.config import RunConfig
from glmtune.training.distributed.deepspeed_settings import SHARDABLE, DeepSpeedSettings, effective

CHECKPOINTING_COST = 4 / 3
"""One more forward pass, beside one forward and a backward pass of twice its work."""
SMALLER_BATCH_COST = 1.05
"""Each halving of the rows of a pass (assumed; small products run less well)."""
ZERO_COST: dict[tuple[int, bool], float] = {
    (0, False): 1.0,
    (1, False): 1.03,
    (2, False): 1.05,
    (3, False): 1.5,
    (1, True): 1.9,
    (2, True): 2.0,
    (3, True): 3.0,
}
"""(Stage, offloaded) -> time of a step beside one process alone (assumed: stage 3 sends 1.5 times as much,
arXiv:1910.02054, section 7; offloaded Adam runs on the host)."""
ZERO_NAMES = {
    (1, False): "zero1",
    (2, False): "zero2",
    (3, False): "zero3",
    (2, True): "zero2_offload",
    (3, True): "zero3_offload",
}
BASE_COST = {None: 1.0, "int8": 1.2, "int4": 1.3}
"""Codes are turned into weights in every pass (assumed)."""
CHANGES_RESULTS = 100.0
"""Puts settings that change what is learnt behind all others."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One setting.

    Attributes:
        config: of the run.
        overrides: what differs from the settings asked for, as typed on a command line.
        cost: time of a step beside the fastest setting, estimated.
        changes_results: another base is trained on.
        estimate: its memory.
    """

    config: RunConfig
    overrides: tuple[str, ...]
    cost: float
    changes_results: bool
    estimate: Estimate


def fits(found: Estimate, hardware: Hardware, processes: int = 1) -> bool:
    """Say whether an estimate is within the memory there is.

    Args:
        found: of one process.
        hardware: what there is.
        processes: that share the memory (of a CPU).
    """
    on_device = found.device.total * (processes if hardware.device == "cpu" else 1)
    on_host = hardware.host_bytes is None or found.host_bytes <= hardware.host_bytes
    return on_device <= hardware.device_bytes and on_host


def cheapest(
    config: RunConfig, geometry: Geometry, hardware: Hardware, *, length: int | None = None
) -> Candidate | None:
    """Find the setting of least cost that fits; None if none does.

    Args:
        config: what was asked for; method, lengths, batch of a step and optimizer are kept.
        geometry: of the model.
        hardware: what there is.
        length: see `workload_of`.
    """
    # All combinations rather than a descent: there are some hundreds, and the levers interact (checkpointing
    # makes room for rows, which can make ZeRO needless).
    best: Candidate | None = None
    for candidate, processes in _candidates(config, geometry, hardware, length):
        if best is not None and _rank(candidate) >= _rank(best):
            continue
        if fits(candidate.estimate, hardware, processes):
            best = candidate
    return best


def _rank(candidate: Candidate) -> tuple[float, int]:
    extra = CHANGES_RESULTS if candidate.changes_results else 1.0
    return candidate.cost * extra, len(candidate.overrides)


def _candidates(
    config: RunConfig, geometry: Geometry, hardware: Hardware, length: int | None
) -> Iterator[tuple[Candidate, int]]:
    combinations = itertools.product(
        _batches(config), (False, True), _shardings(config, hardware), _optimizers(config, hardware),
        _bases(config, geometry), _evaluations(config),
    )  # fmt: skip
    for (rows, passes), checkpointing, zero, optim, (base, dtype), eval_rows in combinations:
        if zero is not None and optim not in SHARDABLE:  # DeepSpeed would refuse it
            continue
        trainer = dataclasses.replace(
            config.trainer,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=passes,
            gradient_checkpointing=checkpointing,
            optim=optim,
            per_device_eval_batch_size=eval_rows,
        )
        model = dataclasses.replace(config.model, quantization=base, quantization_bit=None, dtype=dtype)
        if base == config.model.method:
            model = dataclasses.replace(config.model, dtype=dtype)
        distributed = config.distributed if zero is None else None
        try:
            variant = dataclasses.replace(
                config, trainer=trainer, deepspeed=zero, distributed=distributed, model=model
            )
            work = workload_of(variant, geometry, hardware, length=length)
        except ConfigError:  # settings that exclude each other: the run would refuse them, too
            continue
        changes = base != config.model.method or dtype != config.model.dtype
        overrides = tuple(_overrides(config, variant))
        found = Candidate(variant, overrides, _cost(config, variant), changes, estimate(work))
        yield found, work.sharding.per_node


def _cost(config: RunConfig, variant: RunConfig) -> float:
    cost = CHECKPOINTING_COST if variant.trainer.gradient_checkpointing else 1.0
    rows, asked = variant.trainer.per_device_train_batch_size, config.trainer.per_device_train_batch_size
    while rows < asked:
        rows, cost = rows * 2, cost * SMALLER_BATCH_COST
    zero = None if variant.deepspeed is None else effective(variant.deepspeed)
    if variant.distributed is not None:
        cost *= ZERO_COST[3, False]
    stage = (0, False) if zero is None else (zero.stage, zero.offload_optimizer or zero.offload_param)
    eval_rows = variant.trainer.per_device_eval_batch_size
    evaluation = 1.0 if eval_rows == config.trainer.per_device_eval_batch_size else 1.01
    return cost * ZERO_COST[stage] * BASE_COST.get(variant.model.method, 1.3) * evaluation


def _batches(config: RunConfig) -> list[tuple[int, int]]:
    """Rows of a pass and passes of a step, their product kept."""
    rows, passes = config.trainer.per_device_train_batch_size, config.trainer.gradient_accumulation_steps
    found = [(rows, passes)]
    while rows % 2 == 0:
        rows, passes = rows // 2, passes * 2
        found.append((rows, passes))
    return found


def _shardings(config: RunConfig, hardware: Hardware) -> Sequence[DeepSpeedSettings | None]:
    if hardware.device == "cpu":
        return [config.deepspeed]
    given = [config.deepspeed] if config.deepspeed is not None else []
    offloads = [
        DeepSpeedSettings(stage=stage, offload_optimizer=True, offload_param=stage == 3) for stage in (2, 3)
    ]
    if hardware.num_devices == 1:
        return [None, *given, *(offloads if config.tune == "full" else ())]
    return [None, *given, DeepSpeedSettings(stage=2), DeepSpeedSettings(stage=3), *offloads]


def _optimizers(config: RunConfig, hardware: Hardware) -> Sequence[str]:
    asked = config.trainer.optim
    return [asked, "adamw_torch_fused"] if asked == "adamw_torch" and hardware.device == "cuda" else [asked]


def _bases(config: RunConfig, geometry: Geometry) -> Sequence[tuple[str | None, str]]:
    """Ways to hold the base: method of quantization and floating type."""
    asked = (config.model.method, config.model.dtype)
    if config.tune == "full" or geometry.quantization is not None or config.model.method is not None:
        return [asked]
    return [asked, (None, "bfloat16"), ("int8", config.model.dtype), ("int4", config.model.dtype)]


def _evaluations(config: RunConfig) -> Sequence[int]:
    asked = config.trainer.per_device_eval_batch_size
    return [asked] if not config.data.has_validation else sorted({asked, 1}, reverse=True)


def _overrides(config: RunConfig, variant: RunConfig) -> Iterator[str]:
    for name in (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "optim",
        "per_device_eval_batch_size",
    ):
        value = getattr(variant.trainer, name)
        if value != getattr(config.trainer, name):
            yield f"trainer.{name}={str(value).lower() if isinstance(value, bool) else value}"
    zero = variant.deepspeed
    if zero != config.deepspeed:
        offloads = zero is not None and (zero.offload_optimizer or zero.offload_param)
        yield "deepspeed=null" if zero is None else f"deepspeed={ZERO_NAMES[zero.stage, offloads]}"
    if variant.distributed != config.distributed:
        yield "distributed=null"
    if variant.model.method != config.model.method:
        yield f"quantization={variant.model.method}"
    if variant.model.dtype != config.model.dtype:
        yield f"model.dtype={variant.model.dtype}"
