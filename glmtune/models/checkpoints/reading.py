"""Official checkpoints into a model and back, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GlmConfig, PreTrainedModel

from glmtune.errors import CheckpointError
from glmtune.files import write_atomically, write_json
from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.checkpoints.config import official_config
from glmtune.models.checkpoints.names import (
    Entry,
    FusedLayout,
    is_derived,
    name_table,
    official_tensor,
    split_fused,
)
from glmtune.models.checkpoints.quantized_layout import SCALE, ZERO, QuantizedLayout
from glmtune.models.checkpoints.shards import (
    INDEX_SUFFIX,
    SAFETENSORS_FILE,
    TensorRecord,
    copy_into,
    read_records,
    read_tensor,
)
from glmtune.models.releases.families import Family

DEFAULT_SHARD_BYTES = 2 * 2**30
Opened = Callable[[Sequence[str]], AbstractContextManager[Sequence[Tensor] | None]]
"""Given names of parameters, offers memory of their shapes to be written to, inside a ``with`` block; None
where this process is not to read them."""


def read_into(
    model: nn.Module,
    folder: Path,
    config: GlmConfig | ChatGlmConfig,
    quantize: Callable[[Entry, TensorRecord], Mapping[str, Tensor]] | None = None,
    opened: Opened | None = None,
) -> None:
    """Fill a model's parameters from an official checkpoint, reading every byte once.

    Args:
        model: parameters allocated in the wanted dtype and device (not meta); overwritten.
        folder: the checkpoint's folder.
        config: as made by `native_config`; says how the checkpoint stores its weights.
        quantize: makes the tensors of a layer of codes from a stored weight, see `Quantizer.quantize`; None
            where the model holds its weights as the checkpoint does.
        opened: says where parameters are to be written, a few at a time, in the order of the files; None:
            into the model's own.

    Raises:
        CheckpointError: missing, leftover or misshapen tensors, all of them named; nothing is read then.
    """
    records = read_records(folder)
    check_records(records, config, folder)
    layout, opened = FusedLayout.of(config), opened or _own(model)
    wanted = QuantizedLayout.of(getattr(model, "config", config))
    needed = (entry for entry in name_table(config) if not entry.is_copy)
    entries = sorted(needed, key=lambda entry: _place(records[entry.official]))
    with torch.no_grad():
        for entry in entries:
            record = records[entry.official]
            module, _, kind = entry.official.rpartition(".")
            if quantize is not None and wanted is not None and kind == "weight" and wanted.holds(module):
                for name, made in quantize(entry, record).items():
                    with opened([f"{weight.removesuffix(kind)}{name}" for weight in entry.native]) as targets:
                        if targets is not None:
                            _fill(targets, made, layout)
                continue
            with opened(entry.native) as targets:
                if targets is not None and len(targets) == 1:
                    copy_into(targets[0], record)
                elif targets is not None:
                    _fill(targets, read_tensor(record), layout)


def _own(model: nn.Module) -> Opened:
    """Offer the memory that the parameters of a model have."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    return lambda names: nullcontext([tensors[name].data for name in names])


def _fill(targets: Sequence[Tensor], stored: Tensor, layout: FusedLayout) -> None:
    parts = (stored,) if len(targets) == 1 else split_fused(stored, layout)
    for target, part in zip(targets, parts, strict=True):
        target.copy_(part)


def check_records(
    records: Mapping[str, TensorRecord], config: GlmConfig | ChatGlmConfig, folder: Path
) -> None:
    """Compare what a checkpoint holds with what the configuration asks for.

    Raises:
        CheckpointError: missing, leftover or misshapen tensors, all of them named.
    """
    table = {entry.official: entry for entry in name_table(config)}
    missing = [name for name, entry in table.items() if name not in records and not entry.is_copy]
    leftover = sorted(name for name in records if name not in table and not is_derived(name))
    problems = []
    if missing:
        files = sorted({record.file.name for record in records.values()})
        problems.append(f"{len(missing)} missing: {_listed(missing)} (looked in {_listed(files, 4)})")
    if leftover:
        problems.append(
            f"{len(leftover)} leftover, which the model has no place for: "
            + _listed([f"{name} in {records[name].file.name}" for name in leftover])
        )
    shaped = [(entry, records[name]) for name, entry in table.items() if name in records]
    wrong = [
        f"{entry.official} is {list(record.shape)} in {record.file.name}, but config.json asks for "
        f"{list(entry.shape)}"
        for entry, record in shaped
        if record.shape != entry.shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {_listed(wrong, 4)}")
    problems += _type_problems(shaped)
    if problems:
        raise CheckpointError(
            f"{folder}: tensors do not fit:\n"
            + "\n".join(f"- {p}" for p in problems)
            + f"\n{_way_out(leftover, shaped, config)}"
        )


def _type_problems(shaped: list[tuple[Entry, TensorRecord]]) -> list[str]:
    """Codes must be int8, everything else floating point."""
    named = [
        (f"{entry.official} ({record.dtype} in {record.file.name})", entry.is_codes, record.dtype)
        for entry, record in shaped
    ]
    codes = [name for name, is_codes, dtype in named if not is_codes and not dtype.is_floating_point]
    floats = [name for name, is_codes, dtype in named if is_codes and dtype != torch.int8]
    problems = []
    if codes:
        problems.append(f"{len(codes)} hold integer codes, but must be floating point: {_listed(codes, 4)}")
    if floats:
        problems.append(f"{len(floats)} must hold codes of type int8, but do not: {_listed(floats, 4)}")
    return problems


def _way_out(
    leftover: list[str], shaped: list[tuple[Entry, TensorRecord]], config: GlmConfig | ChatGlmConfig
) -> str:
    quantized = QuantizedLayout.of(config)
    if quantized is None and any(name.endswith(f".{SCALE}") for name in leftover):
        return (
            "The weights are quantized, but config.json has no quantization_bit: restore the config.json "
            "that was written with them (4 where a row has half as many bytes as columns, else 8)."
        )
    if quantized is not None and any(
        entry.is_codes and record.dtype.is_floating_point for entry, record in shaped
    ):
        return (
            f"config.json asks for {quantized.bits}-bit codes, but the weights are not quantized: remove "
            f"quantization_bit from it, and quantize on loading (`quantization=int{quantized.bits}`)."
        )
    if quantized is not None and any(
        entry.is_codes and record.shape[1:] != entry.shape[1:] for entry, record in shaped
    ):
        return (
            f"config.json says {quantized.bits} bits per weight; the bytes of a row do not fit that. "
            "config.json and the weights must come from the same release (-int4 or -int8)."
        )
    if leftover and all(".prefix_encoder." in name for name in leftover):
        return "The leftover ones are a tuned prefix: load the base model, and this folder as its prefix."
    return "config.json and the weights must come from the same, complete checkpoint."


def save_official(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> list[Path]:
    """Write a model as an official checkpoint: official names, official config.json, safetensors.

    Each file appears whole or not at all; weights of an earlier save in the folder are removed at the end.

    Args:
        model: configured by `native_config`.
        folder: created if absent.
        max_shard_bytes: a new file begins where the next tensor would exceed it.
        dtype: floating type to store; None keeps each tensor's own.
        state_dict: native name → tensor, where they are not the model's own (gathered by a trainer).

    Returns:
        The files written, config.json last.

    Raises:
        CheckpointError: parameters of the model are missing from ``state_dict``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = model.config
    family = Family(getattr(config, "glmtune_family", Family.GLM4))
    state = model.state_dict() if state_dict is None else state_dict
    missing = [name for entry in name_table(config) for name in entry.native if name not in state]
    if missing:
        raise CheckpointError(
            f"Cannot save {folder}: {len(missing)} tensors are missing: {_listed(missing)}."
        )
    shards = _plan_shards(state, config, max_shard_bytes, dtype)
    names = _shard_names(len(shards))
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for name, shard in zip(names, shards, strict=True):
        tensors = {}
        for entry in shard:
            tensor = official_tensor(entry, state, FusedLayout.of(config)).detach()
            # A copy: head and embedding may be one matrix, and every file entry needs bytes of its own.
            tensors[entry.official] = tensor.to("cpu", _kept(entry, tensor, dtype), copy=True).contiguous()
            total_bytes += tensors[entry.official].nbytes
        write_atomically(
            folder / name, lambda path, data=tensors: save_file(data, path, metadata={"format": "pt"})
        )
        weight_map |= dict.fromkeys(tensors, name)
    written = [folder / name for name in names]
    if len(names) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        written.append(folder / f"{SAFETENSORS_FILE}{INDEX_SUFFIX}")
        write_json(written[-1], index)
    stored = next(_kept(e, state[e.native[0]], dtype) for e in name_table(config) if not _is_quantized(e))
    official = official_config(config, family) | {"torch_dtype": str(stored).removeprefix("torch.")}
    written.append(folder / "config.json")
    write_json(written[-1], official)
    for stale in _earlier_weights(folder):
        if stale not in written:
            stale.unlink()
    return written


def _plan_shards(
    state: Mapping[str, Tensor],
    config: GlmConfig | ChatGlmConfig,
    max_shard_bytes: int,
    dtype: torch.dtype | None,
) -> list[list]:
    shards: list[list] = [[]]
    used = 0
    for entry in name_table(config):
        num_bytes = sum(
            state[name].numel() * _kept(entry, state[name], dtype).itemsize for name in entry.native
        )
        if shards[-1] and used + num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += num_bytes
    return shards


def _kept(entry: Entry, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the type to store: codes, scales and zero points are never cast."""
    return tensor.dtype if _is_quantized(entry) or dtype is None else dtype


def _is_quantized(entry: Entry) -> bool:
    return entry.is_codes or entry.official.endswith((SCALE, ZERO))


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SAFETENSORS_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _earlier_weights(folder: Path) -> Iterator[Path]:
    pattern = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    return (file for file in folder.iterdir() if pattern.fullmatch(file.name))


def _place(record: TensorRecord) -> tuple[str, int]:
    return record.file.name, record.offset


def _listed(names: list[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
