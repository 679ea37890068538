"""`glmtune info`: what a checkpoint, a saved prefix or this machine is, from file headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from glmtune.settings import setting
from recipes.compose import Command

Row = tuple[str, str]


@dataclass(frozen=True)
class InfoConfig:
    """What to look at; nothing named means this machine and the models glmtune knows."""

    source: str | None = setting(None, "preset name, hub id or folder of a checkpoint")
    family: str | None = setting(None, "release line, only if names cannot tell it, such as chatglm2-32k")
    prefix_path: str | None = setting(None, "a saved prefix: its run folder, checkpoint folder or file")


def run(config: InfoConfig) -> None:
    """Print the facts as tables."""
    if config.source is not None:
        _print(f"checkpoint {config.source}", checkpoint_rows(config.source, config.family))
    if config.prefix_path is not None:
        _print(f"prefix {config.prefix_path}", prefix_rows(config.prefix_path))
    if config.source is None and config.prefix_path is None:
        _print("this machine", machine_rows())
        _print("presets (model=NAME, or model.source=HUB_ID_OR_FOLDER)", preset_rows())


def checkpoint_rows(source: str, family: str | None) -> Iterator[Row]:
    """Yield what config.json and the headers of the weight files say of a checkpoint."""
    from glmtune.models.facts import describe

    facts = describe(source, family=family)
    yield "folder", str(facts.folder)
    yield "family", facts.family.value
    yield "parameters", f"{facts.num_parameters:,} ({facts.num_bytes / 2**20:,.1f} MiB as {facts.dtype})"
    if facts.quantization_bit:
        yield "quantized", f"{facts.quantization_bit} bits"
    yield "layers", str(facts.num_layers)
    yield "hidden size", str(facts.hidden_size)
    yield "heads", f"{facts.num_heads} x {facts.head_dim}, {facts.num_kv_heads} for keys and values"
    yield "vocabulary", f"{facts.vocab_size:,} rows"
    yield "positions", f"{facts.max_positions:,} tokens"
    yield "weight files", ", ".join(facts.files)


def prefix_rows(path: str) -> Iterator[Row]:
    """Yield what the file of a saved prefix says of itself."""
    from glmtune.prefix.checkpoint import describe_prefix

    facts = describe_prefix(path)
    yield "file", f"{facts.file} ({facts.file.stat().st_size / 2**20:,.2f} MiB)"
    yield "pre_seq_len", str(facts.pre_seq_len)
    yield "prefix_projection", str(facts.prefix_projection).lower()
    yield "base", facts.meta.base_source or "not recorded"
    yield "base fingerprint", facts.meta.base_fingerprint or "not recorded (official checkpoints hold none)"
    yield "template", facts.meta.template or "not recorded"
    yield "data fingerprint", facts.meta.data_fingerprint or "not recorded"
    yield "written by glmtune", facts.meta.glmtune_version or "no"


def machine_rows() -> Iterator[Row]:
    """Yield versions, processors, memory and GPUs: what an issue report should hold."""
    import os
    import platform
    from importlib.metadata import version

    import psutil
    import torch

    yield "python", platform.python_version()
    for package in ("glmtune", "torch", "transformers", "peft", "accelerate", "datasets"):
        yield package, version(package)
    yield (
        "processor",
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
    )
    memory = psutil.virtual_memory()
    yield "memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.1f} GiB"
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use"


def preset_rows() -> Iterator[Row]:
    """Yield the names that `model.source` understands."""
    from glmtune.models.presets import PRESETS

    for name, preset in PRESETS.items():
        yield name, f"{preset.summary} ({preset.hub_id or 'in the package'})"


def _print(title: str, rows: Iterator[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(name, Text(value))
    Console().print(table)


COMMAND = Command(
    name="info",
    summary="Say what a checkpoint, a saved prefix or this machine is, without loading weights.",
    schema=InfoConfig,
    run=run,
    bare_word="source",
    examples=(
        "glmtune info",
        "glmtune info glm-tiny",
        "glmtune info THUDM/chatglm2-6b",
        "glmtune info prefix_path=runs/adgen",
    ),
)
