"""A plan as tables for people and as plain values for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from glmtune.planning.check import Plan
from glmtune.planning.estimate import GIB, Memory
from glmtune.planning.probe import Probe
from glmtune.planning.published import reports_for
from glmtune.planning.states import num_trained
from glmtune.planning.workload import Batch
from glmtune.tables import TextTable

PARTS = tuple(field.name for field in dataclasses.fields(Memory))
NOTES = {
    "weights": "the base, and what is added to it",
    "gradients": "of trained numbers",
    "optimizer": "states; under ZeRO float32 weights, too",
    "activations": "kept for the backward pass, and of the block at work",
    "logits": "of the labels at work, their loss and gradient",
    "buffers": "16-bit copies, buckets, gathered or decoded weights, temporaries",
    "snapshot": "copy that a checkpoint is written from, beside training",
    "overhead": "libraries or CUDA context, allocator",
}


def memory_table(plan: Plan) -> TextTable:
    """Lay out memory by part, at the moment when it is largest."""
    where = "process" if plan.work.device == "cpu" else "GPU"
    device = plan.estimate.device
    rows = [(name, f"{getattr(device, name) / GIB:.2f}", NOTES[name]) for name in PARTS]
    rows.append(("in all", f"{device.total / GIB:.2f}", f"of {plan.hardware.device_bytes / GIB:.1f}"))
    if plan.work.device != "cpu":
        host = plan.hardware.host_bytes
        limit = "per machine" if host is None else f"per machine, of {host / GIB:.1f}"
        rows.append(("host", f"{plan.estimate.host_bytes / GIB:.2f}", limit))
    title = f"memory per {where}, at its largest ({plan.estimate.moment})"
    return TextTable(title, ("part", "GiB", "what"), tuple(rows), text_columns=("what",))


def summary_rows(plan: Plan) -> list[tuple[str, str]]:
    """List what the plan reckons with, as (name, value)."""
    work, geometry, batch = plan.work, plan.geometry, plan.work.batch
    trained = num_trained(work)
    zero = work.sharding
    offload = [
        name for name, on in (("optimizer", zero.offload_optimizer), ("weights", zero.offload_param)) if on
    ]
    sharing = "FSDP" if zero.fsdp else f"ZeRO-{zero.stage}" if zero.stage else "no ZeRO"
    sharing += f", {' and '.join(offload)} in host memory" if offload else ""
    levers = f"gradient checkpointing {'on' if work.checkpointing else 'off'}, {sharing}"
    levers += ", checkpoints written beside training" if work.saves_asynchronously else ""
    embeddings = "" if work.embeddings is None else f", embedding and head {work.embeddings}"
    precision = {1: "", 2: "16 bits", 4: "float32"}[work.weight_bytes]
    precision += " under 16-bit autocast" if work.autocast else ""
    return [
        ("model", f"{geometry.name}, {geometry.num_parameters:,} parameters"),
        ("hardware", str(plan.hardware)),
        ("method", f"{work.tune}, {trained:,} numbers trained, {work.optim}"),
        ("base", f"{work.method or 'not quantized'}{embeddings}, {precision}"),
        (
            "batch",
            f"{batch.rows} rows of up to {batch.length:,} tokens x {batch.accumulation} passes x "
            f"{zero.num_processes} process{'es' if zero.num_processes > 1 else ''}",
        ),
        *([] if work.replay is None else [("replay", _replay(work.replay, batch.accumulation))]),
        ("levers", levers),
    ]


def _replay(replay: Batch, passes: int) -> str:
    rows = f"{replay.rows} general row{'s' if replay.rows > 1 else ''} of up to {replay.length:,} tokens"
    return f"{rows} beside {replay.accumulation} of {passes} passes"


def published_table(plan: Plan) -> TextTable | None:
    """Lay out what others reported of this model and method; None if nobody did."""
    reports = reports_for(plan.work)
    if not reports:
        return None
    gpus = plan.work.sharding.num_processes
    rows = [("this estimate", f"{plan.estimate.device.total / GIB:.1f}", str(gpus), "")]
    for report in reports:
        size = "-" if report.gib is None else f"{report.gib:.1f}"
        rows.append((f"{report.outcome}; {report.note}", size, str(report.gpus or "?"), report.source))
    columns = ("what", "GiB per GPU", "GPUs", "source")
    title = "published for this model and method, beside"
    return TextTable(title, columns, tuple(rows), text_columns=("source",))


def time_rows(plan: Plan, probe: Probe, epoch: tuple[int, float, int, float] | None) -> list[tuple[str, str]]:
    """List what the probe showed, as (name, value).

    Args:
        plan: of the run.
        probe: measured.
        epoch: rows, mean tokens of a row, steps and seconds of a pass over the data, if it could be read.
    """
    passes = plan.work.batch.accumulation
    rows = [
        ("on", probe.device),
        ("forward and backward", f"{probe.pass_seconds:.3g} s for {probe.tokens:,} tokens"),
        ("optimizer", f"{probe.update_seconds:.3g} s"),
        ("step", f"{probe.step_seconds:.3g} s ({passes} pass{'es' if passes > 1 else ''})"),
    ]
    if probe.peak_bytes is not None:
        rows.append(("allocated", f"{probe.peak_bytes / GIB:.2f} GiB at most"))
    if epoch is None:
        return [*rows, ("epoch", "not known: rows or tokenizer are not on this machine")]
    count, mean, steps, seconds = epoch
    duration = timedelta(seconds=round(seconds))
    return [*rows, ("epoch", f"{duration} ({count:,} rows of {mean:.0f} tokens on average, {steps:,} steps)")]


def plain_values(
    plan: Plan, command: Sequence[str], probe: Probe | None = None, *, problem: str = ""
) -> dict[str, Any]:
    """Return a plan as plain values, bytes as integers, for JSON.

    Args:
        plan: of a run.
        command: the cheapest setting's command line, word by word; empty if nothing fits.
        probe: measured time, if any.
        problem: why it does not fit, "" if it does.
    """
    best = plan.best
    return {
        "model": dataclasses.asdict(plan.geometry),
        "hardware": dataclasses.asdict(plan.hardware),
        "workload": {
            name: value for name, value in dataclasses.asdict(plan.work).items() if name != "geometry"
        },
        "trained_parameters": num_trained(plan.work),
        "fits": plan.fits,
        "problem": problem,
        "notes": list(plan.notes),
        "device_bytes": {name: int(getattr(plan.estimate.device, name)) for name in PARTS},
        "device_total_bytes": int(plan.estimate.device.total),
        "largest_at": plan.estimate.moment,
        "moments_bytes": {name: int(total) for name, total in plan.estimate.moments.items()},
        "host_bytes": int(plan.estimate.host_bytes),
        "best": None
        if best is None
        else {
            "command": " ".join(command),
            "changes": list(best.overrides),
            "changes_results": best.changes_results,
            "device_total_bytes": int(best.estimate.device.total),
            "host_bytes": int(best.estimate.host_bytes),
        },
        "published": [dataclasses.asdict(report) for report in reports_for(plan.work)],
        "probe": None if probe is None else dataclasses.asdict(probe),
    }
