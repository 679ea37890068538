"""The parts of the check: what matters most first, as the time may end before the list does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.rivals import missing

KERNEL_TESTS = ("tests/quantization/kernels/test_triton.py", "tests/models/test_load.py")
"""Have tests of GPUs beside others; those of the second file are no matter of a dry run."""


@dataclass(frozen=True, slots=True)
class Part:
    """One process.

    Attributes:
        name: for ``--only`` and the report.
        kind: the table of the report: ``tests``, ``decode``, ``compiled``, ``tune`` or ``engine``.
        program: module whose ``main`` runs.
        words: its command line.
        seconds: at most, on a GPU.
        dry_words: its command line in a dry run, where that is another one.
        why_not: says why it cannot run here; "" if it can.
    """

    name: str
    kind: str
    program: str
    words: tuple[str, ...]
    seconds: int
    dry_words: tuple[str, ...] | None = None
    why_not: Callable[[], str] = lambda: ""


def _tests(name: str, *files: str, seconds: int, dry_files: tuple[str, ...] | None = None) -> Part:
    return Part(f"tests-{name}", "tests", "benchmarks.gpu.marked_tests", files, seconds, dry_files)


def _decode(method: str, *, seconds: int = 50) -> Part:
    words = ("--method", method)
    return Part(method, "decode", "benchmarks.gpu.decode", words, seconds)


def _rival(method: str) -> Part:
    words = ("--method", method)
    return Part(method, "decode", "benchmarks.gpu.decode", words, 50, why_not=lambda: missing(method))


def _tune(case: str, *, seconds: int = 50) -> Part:
    return Part(f"tune-{case}", "tune", "benchmarks.gpu.tune", ("--case", case), seconds)


PARTS = (
    _tests("kernels", *KERNEL_TESTS, seconds=90, dry_files=KERNEL_TESTS[:1]),
    _tests("inference", "tests/gpu/test_inference.py", seconds=60),
    _decode("bf16"),
    _decode("int8"),
    _decode("int4"),
    _tune("ptuning-int4"),
    Part("engine-bf16", "engine", "benchmarks.gpu.throughput", ("--method", "bf16"), 60),
    Part("engine-int4", "engine", "benchmarks.gpu.throughput", ("--method", "int4"), 60),
    _tests("training", "tests/gpu/test_training.py", seconds=110),
    _tests("processes", "tests/gpu/test_processes.py", seconds=75),
    _rival("nf4"),
    _rival("torchao-int4"),
    _tune("ptuning-bf16", seconds=40),
    _tune("lora-bf16", seconds=40),
    _tune("full-bf16", seconds=60),
    Part(
        "bf16-compiled",
        "compiled",
        "benchmarks.gpu.decode",
        ("--method", "bf16", "--compiled"),
        90,
    ),
)
