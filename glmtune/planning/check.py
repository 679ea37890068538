"""The check before a run: does it fit, and if not, what to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from glmtune.errors import ConfigError, GlmtuneError
from glmtune.planning.estimate import GIB, Estimate, estimate
from glmtune.planning.geometry import Geometry, read_geometry
from glmtune.planning.hardware import Hardware, detect_hardware, parse_hardware
from glmtune.planning.lengths import with_lengths
from glmtune.planning.search import Candidate, cheapest, fits
from glmtune.planning.settings import PlanSettings
from glmtune.planning.workload import Workload, workload_of
from glmtune.training.config import RunConfig
from glmtune.training.distributed.deepspeed_settings import not_planned


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will need, and what would be better.

    Attributes:
        geometry: of the model.
        hardware: where it would run.
        work: what one process computes.
        estimate: its memory.
        fits: it is within the memory there is.
        best: the cheapest setting that fits, None if none does.
        notes: what was asked for and is not in the figures.
    """

    geometry: Geometry
    hardware: Hardware
    work: Workload
    estimate: Estimate
    fits: bool
    best: Candidate | None
    notes: tuple[str, ...] = ()


def make_plan(config: RunConfig, hardware: str | None = None, *, length: int | None = None) -> Plan:
    """Reckon what a run needs; neither weights nor network are touched.

    Args:
        config: of the run.
        hardware: see `parse_hardware`; None: what this machine has.
        length: tokens of the longest row; None: the longest that the data settings allow.

    Raises:
        ConfigError: unknown model or hardware, or settings that contradict the model.
        CheckpointError: the model's config.json cannot be used.
    """
    config, lengths = with_lengths(config)
    source = config.model.source
    geometry = read_geometry(source, family=config.model.family, from_scratch=config.from_scratch)
    place = parse_hardware(hardware) if hardware is not None else detect_hardware(config.model.device)
    work = workload_of(config, geometry, place, length=length)
    found = estimate(work)
    best = cheapest(config, geometry, place, length=length)
    is_enough = fits(found, place, work.sharding.per_node)
    return Plan(geometry, place, work, found, is_enough, best, tuple(_notes(config, lengths)))


def _notes(config: RunConfig, lengths: str) -> Iterator[str]:
    if lengths:
        yield lengths
    if config.trainer.torch_compile:
        yield (
            "`trainer.torch_compile`: activations are counted as without it. Compiled layers keep fewer, so "
            "this is the most there can be; what compiling itself needs for minutes is not counted."
        )
    ignored = [] if config.deepspeed is None else not_planned(config.deepspeed)
    if ignored and config.deepspeed is not None:
        yield f"not counted, of {config.deepspeed.config_file}: {'; '.join(ignored)}."


def memory_problem(plan: Plan) -> str:
    """Word why a plan does not fit and what to change; "" if it fits."""
    if plan.fits:
        return ""
    found, hardware = plan.estimate, plan.hardware
    processes = plan.work.sharding.per_node if hardware.device == "cpu" else 1
    needed = found.device.total * processes
    where = "The process" if hardware.device == "cpu" else "Every GPU"
    if needed > hardware.device_bytes:
        wants = f"{where} needs about {needed / GIB:.1f} GiB (at its largest: {found.moment})"
        has = f"there are {hardware.device_bytes / GIB:.1f} GiB"
    else:
        wants = f"The machine needs about {found.host_bytes / GIB:.1f} GiB beside its GPUs"
        has = f"it has {(hardware.host_bytes or 0) / GIB:.1f} GiB"
    if plan.best is None:
        return f"{wants}, but {has}. No setting of this method fits; {_other_ways(plan.work)}."
    changes = "`, `".join(plan.best.overrides)
    note = " (which changes what is learnt)" if plan.best.changes_results else ""
    return (
        f"{wants}, but {has}. With `{changes}`{note} it would be "
        f"{plan.best.estimate.device.total / GIB:.1f} GiB."
    )


def check_run(config: RunConfig, settings: PlanSettings) -> str:
    """Check a run before it starts.

    Args:
        config: of the run.
        settings: whether to refuse it.

    Returns:
        A warning, "" if the run fits.

    Raises:
        ConfigError: it cannot fit and ``plan.enforce`` is true.
    """
    try:
        problem = memory_problem(make_plan(config, settings.hardware))
    except GlmtuneError:
        if settings.enforce or settings.hardware is not None:
            raise
        return ""  # what is wrong with the settings, loading says better
    if problem and settings.enforce:
        raise ConfigError(
            f"The run cannot fit, and `plan.enforce` is true. {problem} `glmtune plan` with the same "
            "settings shows every part; `plan.enforce=false` starts it all the same."
        ).see("out-of-memory")
    return problem


def _other_ways(work: Workload) -> str:
    if work.is_full:
        return (
            "tune a part (`+recipe=lora`, `+recipe=ptuning`), shorten the rows, or take more or larger GPUs"
        )
    return "shorten the rows, take a smaller model, or more memory"
