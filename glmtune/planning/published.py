"""What others reported of the same model and method; ``benchmarks/published.yaml`` holds the figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmtune.planning.workload import Workload
from glmtune.storage.names import last_part

INSTALLED = Path(__file__).with_name("published.yaml")
CHECKOUT = Path(__file__).resolve().parents[2] / "benchmarks" / "published.yaml"


@dataclass(frozen=True, slots=True)
class PublishedMemory:
    """One report.

    Attributes:
        models: releases it stands for.
        tune: ``full``, ``prefix`` or ``lora``.
        quantization: of the base; ``none`` for floating point.
        gpus: number of GPUs, 0 if it was not told.
        gib: memory of one GPU; None: only whether it ran.
        outcome: in words.
        note: settings, as far as they were told.
        source: where it was published.
    """

    models: tuple[str, ...]
    tune: str
    quantization: str
    gpus: int
    gib: float | None
    outcome: str
    note: str
    source: str


def published_memory() -> tuple[PublishedMemory, ...]:
    """Return all reports."""
    from glmtune.storage.yaml_text import read_yaml

    file = INSTALLED if INSTALLED.is_file() else CHECKOUT
    rows: list[dict[str, Any]] = read_yaml(file)
    for row in rows:
        row["models"] = tuple(row["models"])
    return tuple(PublishedMemory(**row) for row in rows)


def reports_for(work: Workload) -> tuple[PublishedMemory, ...]:
    """Return the reports on a run's model and method.

    Args:
        work: of the run; its base counts as quantized by the bits alone.
    """
    name = last_part(work.geometry.name).partition("-int")[0]
    bits = "none" if work.bits is None else f"int{work.bits}"
    return tuple(
        report
        for report in published_memory()
        if name in report.models and report.tune == work.tune and report.quantization == bits
    )
