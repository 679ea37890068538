"""The report of a check in Markdown: figures beside published ones, and what was not measured and why."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu.parts import Part

BENCHMARKS = Path(__file__).resolve().parents[1]
TUNE_PUBLISHED = {
    "tune-ptuning-int4": ("chatglm2-6b", "prefix", "int4"),
    "tune-ptuning-bf16": ("chatglm3-6b", "prefix", "none"),
    "tune-lora-bf16": ("chatglm3-6b", "lora", "none"),
}
"""Part → model, method and quantization of the row of `published.yaml` beside it."""


@dataclass
class Outcome:
    """What came of a part.

    Attributes:
        part: which.
        state: ``done``, ``skipped``, ``failed``, ``too slow``, ``stopped`` or ``not run``.
        seconds: it took.
        figures: by name, also of a part that failed later on.
        note: why, and the end of what it said.
    """

    part: Part
    state: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    note: str = ""


def file_name(card: str) -> str:
    """Return the file of a card's report: ``NVIDIA H200`` is ``nvidia-h200.md``."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".md"


def write_report(
    file: Path,
    machine: Mapping[str, Any],
    outcomes: Mapping[str, Outcome],
    *,
    state: str,
    is_dry: bool,
) -> None:
    """Write the report; whoever reads it meanwhile sees the earlier one or this one whole.

    Args:
        file: where.
        machine: facts and versions.
        outcomes: by name of part.
        state: of the whole check, in words.
        is_dry: the sizes are tiny, and no figure means anything.
    """
    lines = [f"# GPU check: {machine.get('card', 'unknown')}", ""]
    if is_dry:
        lines += ["**A dry run: tiny sizes on a CPU. The figures mean nothing.**", ""]
    took = sum(found.seconds for found in outcomes.values())
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines += [
        f"`bash scripts/gpu_check.sh`, {when}, {took:.0f} s, {state}; random weights made on the device.",
        "",
    ]
    lines += [", ".join(f"{name} {value}" for name, value in machine.items() if name != "card") + ".", ""]
    for section in (_tests, _decode, _tune, _engine, _rest):
        lines += section(outcomes)
    partial = file.with_suffix(".partial")
    partial.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    os.replace(partial, file)


def _of(outcomes: Mapping[str, Outcome], *kinds: str) -> list[Outcome]:
    return [found for found in outcomes.values() if found.part.kind in kinds]


def _table(heads: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", f"|---{'|---:' * (len(heads) - 1)}|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _number(value: Any, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _tests(outcomes: Mapping[str, Outcome]) -> list[str]:
    found = _of(outcomes, "tests")
    if not found:
        return []
    rows = [
        (
            each.part.name.removeprefix("tests-"),
            *(str(each.figures.get(name, "")) for name in ("passed", "failed", "skipped")),
            _number(each.seconds),
            each.state,
        )
        for each in found
    ]
    reasons = {
        f"{count} skipped: {reason}"
        for each in found
        for reason, count in each.figures.get("skip_reasons", {}).items()
    }
    heads = ("tests", "passed", "failed", "skipped", "seconds", "")
    return ["## Tests", "", *_table(heads, rows), *(f"- {reason}" for reason in sorted(reasons)), ""]


def _decode(outcomes: Mapping[str, Outcome]) -> list[str]:
    found = _of(outcomes, "decode", "compiled")
    if not found:
        return []
    published = yaml.safe_load((BENCHMARKS / "published_inference.yaml").read_text(encoding="utf-8"))
    per_token, speed = published["characters_per_token"], published["characters_per_second"]
    rows = []
    for each in found:
        figures, beside = each.figures, published.get(each.part.name, {})
        decode = figures.get("decode")
        characters = None if decode is None else decode * per_token
        rows.append(
            (
                each.part.name,
                _number(decode),
                _number(characters),
                "" if characters is None else f"{characters / speed:.2f} x",
                _number(figures.get("prefill"), 0),
                _number(figures.get("encode_taken_gib"), 2),
                str(beside.get("encode_2048_gb", "")),
                _number(figures.get("context_taken_gib"), 2),
                str(beside.get("generate_8192_gb", "")),
                each.state,
            )
        )
    heads = (
        *("weights", "decode, tokens/s", "characters/s", f"of {speed}", "prefill, tokens/s"),
        *("reading 2,048: GiB", "published GB", "8,192 held: GiB", "published GB", ""),
    )
    return [
        "## Generation, the shape of ChatGLM2-6B, one row",
        "",
        *_table(heads, rows),
        f"Decoding is `model.generate`, greedy, 256 tokens behind 8. Characters: {per_token} per token, as "
        f"ADGEN's answers have with the released tokenizer; {speed} characters/s and the memory were "
        f"published for ChatGLM2-6B ({published['card']}; {published['source']}). Memory is what the card "
        "lacks for this process: PyTorch's blocks, CUDA's context and loaded kernels.",
        "",
        *(f"- {each.part.name}: {each.figures['library']}" for each in found if "library" in each.figures),
        *(
            f"- {each.part.name}: products {each.figures['products']}"
            for each in found
            if each.figures.get("products")
        ),
        "",
    ]


def _published_gib(name: str) -> str:
    """Return the published memory of a way to tune, "" where there is none."""
    if name not in TUNE_PUBLISHED:
        return ""
    model, tune, quantization = TUNE_PUBLISHED[name]
    reports = yaml.safe_load((BENCHMARKS / "published.yaml").read_text(encoding="utf-8"))
    for row in reports:
        if model in row["models"] and (row["tune"], row["quantization"]) == (tune, quantization):
            return f"{row['gib']} ({model})"
    raise LookupError(f"published.yaml has no row of {TUNE_PUBLISHED[name]}")


def _tune(outcomes: Mapping[str, Outcome]) -> list[str]:
    found = _of(outcomes, "tune")
    if not found:
        return []
    rows = [
        (
            each.part.name.removeprefix("tune-"),
            _number(each.figures.get("measured_gib"), 2),
            _number(each.figures.get("tensors_gib"), 2),
            _number(each.figures.get("planned_gib"), 2),
            _number(each.figures.get("estimated_over_measured"), 2),
            _published_gib(each.part.name),
            _number(each.figures.get("pass_seconds"), 3),
            str(each.figures.get("moment", "")),
            each.state,
        )
        for each in found
    ]
    heads = (
        *("run", "measured GiB", "tensors GiB", "`glmtune plan` GiB", "plan / measured", "published GiB"),
        *("seconds of a pass", "planned to be largest at", ""),
    )
    return [
        "## Tuning, the shape of ChatGLM2-6B, rows of 64 + 128 tokens, one at a time",
        "",
        *_table(heads, rows),
        "Three steps of `glmtune train`: INT4 with gradient checkpointing, 16 passes a step and a prefix of "
        "128, as published; the others one pass a step; `full` with checkpointing. Published runs had "
        "settings of their own (`benchmarks/published.yaml`).",
        "",
    ]


def _engine(outcomes: Mapping[str, Outcome]) -> list[str]:
    found = _of(outcomes, "engine")
    if not found:
        return []
    counts = (1, 16, 64)
    rows = [
        (
            each.part.name.removeprefix("engine-"),
            *(_number(each.figures.get(f"rows_{count}")) for count in counts),
            _number(each.figures.get("taken_gib"), 2),
            each.state,
        )
        for each in found
    ]
    heads = ("weights", *(f"{count} row{'s' * (count > 1)}, tokens/s" for count in counts), "GiB", "")
    return [
        "## Request engine, prompts and answers of 128 tokens",
        "",
        *_table(heads, rows),
        "New tokens per second of all rows together, reading the prompts included.",
        "",
    ]


def _rest(outcomes: Mapping[str, Outcome]) -> list[str]:
    bad = [each for each in outcomes.values() if each.state != "done"]
    if not bad:
        return []
    lines = ["## Not measured", ""]
    for each in bad:
        first, _, rest = each.note.partition("\n")
        lines.append(f"- {each.part.name}: {each.state}{f', {first}' if first else ''}")
        for name in each.figures.get("failures", []):
            lines.append(f"  - {name}")
        if rest and each.state != "skipped":
            lines += ["", "  ```", *(f"  {line}" for line in rest.splitlines()), "  ```", ""]
    return [*lines, ""]
