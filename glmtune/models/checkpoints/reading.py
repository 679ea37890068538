"""Fill a model from an official checkpoint, tensor by tensor.

::

    official name          record (file, offset)      parameters of the model
    ...query_key_value  →  read, rows cut in three →  q_proj, k_proj, v_proj
    ...dense            →  read straight into      →  o_proj
    (to be quantized)   →  codes and scales made   →  weight, weight_scale
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from glmtune.errors import CheckpointError
from glmtune.models.checkpoints.config import NativeConfig
from glmtune.models.checkpoints.finite import check_read
from glmtune.models.checkpoints.headers import TensorRecord
from glmtune.models.checkpoints.names import (
    Entry,
    FusedLayout,
    is_derived,
    listed,
    name_table,
    split_fused,
)
from glmtune.models.checkpoints.quantized_layout import SCALE, QuantizedLayout
from glmtune.models.checkpoints.quantizer import Quantizer
from glmtune.models.checkpoints.shards import OpenShards, read_records
from glmtune.models.checkpoints.sizes import size_problems

Destination = Callable[[Sequence[str]], AbstractContextManager[Sequence[Tensor] | None]]
"""Where tensors are written to: given native names, lends one tensor of its shape for each, inside a ``with``
block at whose end they are complete; or None, in a process of a distributed run that is not to read them.

    @contextmanager
    def destination(names):
        whole = [torch.empty(shapes[name]) for name in names]
        yield whole                             # filled here, from the checkpoint
        for name, tensor in zip(names, whole):  # every process keeps its shard, the whole is freed
            keep_shard(name, tensor)
"""


@dataclass(frozen=True, slots=True)
class OpenWeights:
    """The weight files of a checkpoint, open, and known to hold what the configuration asks for.

    Attributes:
        records: official name → where the tensor lies.
        shards: reads them.
    """

    records: Mapping[str, TensorRecord]
    shards: OpenShards


@contextmanager
def open_weights(folder: Path, config: NativeConfig) -> Generator[OpenWeights]:
    """Open the weight files of a checkpoint and compare their headers with the configuration.

    Args:
        folder: the checkpoint's folder.
        config: as made by `native_config`; says how the checkpoint stores its weights.

    Raises:
        CheckpointError: missing, leftover or misshapen tensors, all of them named.
    """
    with OpenShards() as shards:
        records = read_records(folder, shards)
        check_records(records, config, folder)
        yield OpenWeights(records, shards)


def read_into(
    model: nn.Module, folder: Path, config: NativeConfig, quantizer: Quantizer | None = None
) -> None:
    """Fill a model's parameters from an official checkpoint, reading every byte once.

    Args:
        model: parameters allocated in the wanted dtype and device (not meta); overwritten.
        folder: the checkpoint's folder.
        config: as made by `native_config`; says how the checkpoint stores its weights.
        quantizer: makes codes of the weights for which the model has a quantized layer; None where the model
            holds its weights as the checkpoint does.

    Raises:
        CheckpointError: missing, leftover or misshapen tensors, all of them named; nothing is read then.
    """
    with open_weights(folder, config) as weights:
        fill_model(model, weights, config, quantizer)


def fill_model(
    model: nn.Module,
    weights: OpenWeights,
    config: NativeConfig,
    quantizer: Quantizer | None = None,
) -> None:
    """Fill a model's parameters from files that are open already; see `read_into`."""
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def own_memory(names: Sequence[str]) -> AbstractContextManager[Sequence[Tensor]]:
        return nullcontext([parameters[name].data for name in names])

    codes = None if quantizer is None else QuantizedLayout.of(model.config)
    _fill_all(weights, config, own_memory, quantizer, codes)


def read_weights(folder: Path, config: NativeConfig, destination: Destination) -> None:
    """Read every weight of an official checkpoint once, in the order of the files.

    Args:
        folder: the checkpoint's folder.
        config: as made by `native_config`; says how the checkpoint stores its weights.
        destination: where they are written to.

    Raises:
        CheckpointError: see `read_into`.
    """
    with open_weights(folder, config) as weights:
        _fill_all(weights, config, destination)


@torch.no_grad()
def _fill_all(
    weights: OpenWeights,
    config: NativeConfig,
    destination: Destination,
    quantizer: Quantizer | None = None,
    codes: QuantizedLayout | None = None,
) -> None:
    """Write every weight to its destination; ``codes`` says which ones the quantizer makes codes of."""
    records, shards, fused = weights.records, weights.shards, FusedLayout.of(config)
    needed = (entry for entry in name_table(config) if not entry.is_copy)
    # In the order of the files, so that disks read ahead and each shard is gone through once.
    for entry in sorted(needed, key=lambda entry: _place(records[entry.official])):
        record = records[entry.official]
        module, _, kind = entry.official.rpartition(".")
        if quantizer is not None and codes is not None and kind == "weight" and codes.holds(module):
            for part, made in quantizer.quantize(entry, record, shards).items():
                names = [f"{weight.removesuffix(kind)}{part}" for weight in entry.native]
                check_read(record.file, record.name, (made,))
                with destination(names) as targets:
                    if targets is not None:
                        _fill(targets, made, fused)
            continue
        with destination(entry.native) as targets:
            if targets is not None and len(targets) == 1:
                shards.copy_into(targets[0], record)
            elif targets is not None:
                _fill(targets, shards.read(record), fused)
            check_read(record.file, record.name, targets or ())


def _fill(targets: Sequence[Tensor], stored: Tensor, fused: FusedLayout) -> None:
    parts = (stored,) if len(targets) == 1 else split_fused(stored, fused)
    for target, part in zip(targets, parts, strict=True):
        target.copy_(part)


def check_records(records: Mapping[str, TensorRecord], config: NativeConfig, folder: Path) -> None:
    """Compare what a checkpoint holds with what the configuration asks for.

    Nothing is read or built before this: a wrong checkpoint shall not cost minutes, or leave a model half
    filled, and a config.json that asks for a million blocks shall not get them.

    Raises:
        CheckpointError: missing, leftover or misshapen tensors, all of them named.
    """
    problems = size_problems(records, config)
    if config.num_hidden_layers > len(records):  # a table of so many blocks would take minutes by itself
        raise _misfit(folder, problems, "config.json and the weights must be of the same checkpoint.")
    table = {entry.official: entry for entry in name_table(config)}
    missing = [name for name, entry in table.items() if name not in records and not entry.is_copy]
    leftover = sorted(name for name in records if name not in table and not is_derived(name))
    if missing:
        files = sorted({record.file.name for record in records.values()})
        problems.append(f"{len(missing)} missing: {listed(missing)} (looked in {listed(files, 4)})")
    if leftover:
        problems.append(
            f"{len(leftover)} leftover, which the model has no place for: "
            + listed([f"{name} in {records[name].file.name}" for name in leftover])
        )
    shaped = [(entry, records[name]) for name, entry in table.items() if name in records]
    wrong = [
        f"{entry.official} is {list(record.shape)} in {record.file.name}, but config.json asks for "
        f"{list(entry.shape)}"
        for entry, record in shaped
        if record.shape != entry.shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {listed(wrong, 4)}")
    problems += _type_problems(shaped)
    if problems:
        raise _misfit(folder, problems, _way_out(leftover, shaped, config))


def _misfit(folder: Path, problems: Sequence[str], way_out: str) -> CheckpointError:
    listed_problems = "\n".join(f"- {problem}" for problem in problems)
    return CheckpointError(f"{folder}: tensors do not fit:\n{listed_problems}\n{way_out}")


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
        problems.append(f"{len(codes)} hold integer codes, but must be floating point: {listed(codes, 4)}")
    if floats:
        problems.append(f"{len(floats)} must hold codes of type int8, but do not: {listed(floats, 4)}")
    return problems


def _way_out(leftover: list[str], shaped: list[tuple[Entry, TensorRecord]], config: NativeConfig) -> str:
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


def _place(record: TensorRecord) -> tuple[str, int]:
    return record.file.name, record.offset
