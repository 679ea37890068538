"""`glmtune info`: what a checkpoint, a saved prefix or this machine is, from file headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmtune.models.releases.families import MIXTURES, NATIVE_TYPES, Family
from glmtune.models.settings import CheckpointSettings
from glmtune.settings import setting
from recipes.words.compose import Command

if TYPE_CHECKING:
    from glmtune.models.describe import ModelDescription

Row = tuple[str, str]
GENERATIONS = {
    Family.CHATGLM: "first",
    Family.CHATGLM2: "second",
    Family.CHATGLM2_32K: "second",
    Family.CODEGEEX2: "second",
    Family.CHATGLM3: "third",
    Family.CHATGLM3_32K: "third",
    Family.GLM4: "fourth",
    Family.TRANSFORMERS: "transformers' format",
}


@dataclass(frozen=True)
class InfoConfig:
    """What to look at; nothing named means this machine and the models glmtune knows."""

    model: CheckpointSettings = setting(CheckpointSettings, "the checkpoint")
    prefix_path: str | None = setting(None, "a saved prefix: its run folder, checkpoint folder or file")


def run(config: InfoConfig) -> None:
    """Print it as tables."""
    source = config.model.source
    if source is not None:
        _print(f"checkpoint {source}", checkpoint_rows(source, config.model.family))
    if config.prefix_path is not None:
        _print(f"prefix {config.prefix_path}", prefix_rows(config.prefix_path))
    if source is None and config.prefix_path is None:
        _print("this machine", machine_rows())
        _print("presets (model=NAME, or model=HUB_ID_OR_FOLDER)", preset_rows())


def checkpoint_rows(source: str, family: str | None) -> Iterator[Row]:
    """Yield what config.json and the headers of the weight files say of a checkpoint."""
    from glmtune.models.describe import describe

    found = describe(source, family=family)
    yield "folder", str(found.folder)
    yield "generation", f"{GENERATIONS[found.family]} (family {found.family.value})"
    yield "format", _format(found)
    yield "works", works_with(found)
    yield "parameters", f"{found.num_parameters:,} ({found.num_bytes / 2**20:,.1f} MiB as {found.dtype})"
    yield "layers", str(found.num_layers)
    yield "hidden size", str(found.hidden_size)
    yield "MLP width", str(found.mlp_size)
    yield "heads", f"{found.num_heads} x {found.head_dim}, {found.num_kv_heads} for keys and values"
    yield "vocabulary", f"{found.vocab_size:,} rows"
    yield "positions", f"{found.max_positions:,} tokens"
    tokens = ", ".join(f"{name} {ids}" for name, ids in found.special_tokens.items())
    yield "special tokens", f"{tokens} ({found.tokens_from})"
    yield "quantization", _quantization(found)
    yield "prefix", _prefix(found)
    yield "weight files", ", ".join(found.files)


def _format(found: ModelDescription) -> str:
    if found.model_type == "chatglm":
        return "official (model_type chatglm)"
    return f"transformers (model_type {found.model_type})"


def works_with(found: ModelDescription) -> str:
    """Say what can be done with a checkpoint, and what of it cannot be exported."""
    done = "train (prefix, LoRA, all weights), predict, eval, compare, chat, serve, web, quantize"
    if found.family is Family.CHATGLM:
        return f"{done}; export as official, prefix, tuned (transformers and llama.cpp have no such model)"
    if found.model_type in MIXTURES:
        return "train (LoRA on the attention), plan, predict, eval, compare, chat, serve, web"
    if found.model_type not in ("chatglm", *NATIVE_TYPES):
        return "eval, compare, chat, serve, as a baseline; no GLM, so not train, quantize or export"
    if found.model_type == "glm4":
        return f"{done}; export as transformers, gguf, prefix, tuned (the official format ended before it)"
    return f"{done}; export in every format"


def _quantization(found: ModelDescription) -> str:
    if not found.quantization_bit:
        return "none"
    layers = ", ".join(f"{name} ({count})" for name, count in found.quantized_layers.items())
    method = f"{found.quantization}, {found.quantization_bit} bits"
    return f"{method}: {layers or 'no layer'}; embeddings: {found.quantized_embeddings}"


def _prefix(found: ModelDescription) -> str:
    if not found.pre_seq_len:
        return "none"
    place = "weights inside" if found.holds_prefix else "named in config.json, weights not inside"
    return f"{found.pre_seq_len} tokens, projection {str(found.prefix_projection).lower()} ({place})"


def prefix_rows(path: str) -> Iterator[Row]:
    """Yield what the file of a saved prefix says of itself."""
    from glmtune.prefix.checkpoint import describe_prefix

    prefix = describe_prefix(path)
    yield "file", f"{prefix.file} ({prefix.file.stat().st_size / 2**20:,.2f} MiB)"
    yield "pre_seq_len", str(prefix.pre_seq_len)
    yield "prefix_projection", str(prefix.prefix_projection).lower()
    if prefix.strength != 1:
        yield "strength", f"{prefix.strength:g} (of what was tuned)"
    yield "base", prefix.meta.base_source or "not recorded"
    yield "base fingerprint", prefix.meta.base_fingerprint or "not recorded (official checkpoints hold none)"
    yield "template", prefix.meta.template or "not recorded"
    yield "data fingerprint", prefix.meta.data_fingerprint or "not recorded"
    yield "written by glmtune", prefix.meta.glmtune_version or "no"


def machine_rows() -> Iterator[Row]:
    """Yield versions, processors, memory and GPUs: what an issue report should hold."""
    import os
    import platform
    from importlib.metadata import version

    import psutil
    import torch

    from glmtune.memory import device_name, free_bytes, total_bytes
    from glmtune.models.devices import list_devices

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
    devices = list_devices()
    for device in devices:
        sizes = f"{total_bytes(device) / 2**30:.1f} GiB, {free_bytes(device) / 2**30:.1f} GiB free"
        yield str(device), f"{device_name(device)}, {sizes}"
    if not devices:
        yield "GPU", "none that torch can use"


def preset_rows() -> Iterator[Row]:
    """Yield the names that `model.source` understands."""
    from glmtune.models.releases.presets import PRESETS

    for name, preset in PRESETS.items():
        yield name, f"{preset.summary} ({preset.hub_id or 'in the package'})"


def _print(title: str, rows: Iterator[Row]) -> None:
    from glmtune.tables import named_values
    from glmtune.terminal.console import Console

    Console().print(named_values(rows, title=title))


COMMAND = Command(
    name="info",
    summary="Say what a checkpoint, a saved prefix or this machine is, without loading weights.",
    schema=InfoConfig,
    run=run,
    bare_words=("model.source",),
    examples=(
        "glmtune info",
        "glmtune info glm-tiny",
        "glmtune info model=THUDM/chatglm2-6b",
        "glmtune info prefix_path=runs/adgen",
    ),
)
