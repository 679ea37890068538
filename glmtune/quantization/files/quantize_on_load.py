"""Quantize while a checkpoint is read, tensor by tensor; check what a quantized checkpoint holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.checkpoints.names import Entry, FusedLayout, name_table, split_fused
from glmtune.models.checkpoints.quantized_layout import SCALE, ZERO, QuantizedLayout
from glmtune.models.checkpoints.shards import TensorRecord, read_tensor
from glmtune.models.official import sample_step, sampled_signs, signs_fingerprint
from glmtune.quantization.arithmetic.chunking import quantize_in_chunks
from glmtune.quantization.arithmetic.methods import method_named
from glmtune.quantization.layers.apply import replace_layers
from glmtune.quantization.layers.finished_layers import Part, PartStore
from glmtune.quantization.layers.plan import plain_config, plan_layout, planned_layers
from glmtune.quantization.layers.report import LayerReport, QuantizationReport, layer_report


class QuantizingReader:
    """Fills a model with layers of codes: from a quantized checkpoint, or by quantizing one as it is read.

    Implements `glmtune.models.checkpoints.quantized_layout.Quantizer`; use one for one model.
    """

    def __init__(
        self,
        method: str | None = None,
        *,
        skip: tuple[str, ...] = (),
        embeddings: bool = False,
        measure: bool = False,
        watch: Callable[[int, int], None] | None = None,
        parts: PartStore | None = None,
    ) -> None:
        """Say what is wanted.

        Args:
            method: a name in `METHODS`; None: as the checkpoint is stored.
            skip: see `plan_layout`.
            embeddings: see `plan_layout`.
            measure: compare every weight with its codes, for the report.
            watch: told, as rows are quantized, how many weights are done and how many there are.
            parts: keeps every layer, and gives those that an earlier run finished.

        Raises:
            ConfigError: no such method.
        """
        if method is not None:
            method_named(method)
        self._watch, self._num_done, self._num_weights = watch, 0, 0
        self._method, self._skip, self._embeddings, self._measure = method, skip, embeddings, measure
        self._parts, self._config = parts, cast(Any, None)
        self._found: dict[str, tuple[float, float, torch.dtype]] = {}
        self._signs: dict[str, bytes] = {}
        self._layout: QuantizedLayout | None = None
        self._is_stored = False

    @property
    def report(self) -> QuantizationReport:
        """What was done to every layer; empty where nothing was quantized on reading."""
        layout, layers = self._layout, []
        if layout is None or self._is_stored or self._method is None:
            return QuantizationReport(layout.method if layout else "", ())
        for layer in planned_layers(self._config, layout):
            if not layer.entry.is_copy:
                signal, noise, dtype = self._found.get(layer.name, (0.0, 0.0, self._config.dtype))
                method = method_named(self._method)
                layers.append(layer_report(layer, self._method, method, dtype, signal, noise))
        return QuantizationReport(self._method, tuple[LayerReport, ...](layers))

    def layout(self, stored: QuantizedLayout | None, config: Any) -> QuantizedLayout | None:
        """See `Quantizer.layout`.

        Raises:
            ConfigError: the checkpoint is stored in another way than was asked for; see `plan_layout`.
        """
        self._config = plain_config(config)
        wanted = None
        if self._method is not None:
            wanted = plan_layout(
                self._config, self._method, skip=self._skip, embeddings=self._embeddings and stored is None
            )
        if stored is None and wanted is not None and method_named(wanted.method).calibrated:
            raise ConfigError(
                f"`quantization` is `{wanted.method}`, which needs rows to calibrate with, so it cannot be "
                f"done on loading. Write it once with `glmtune quantize quantization={wanted.method}`."
            )
        if stored is not None and wanted is not None and stored.method != wanted.method:
            raise ConfigError(
                f"`quantization` is `{wanted.method}`, but the checkpoint is stored as `{stored.method}` "
                f"({stored.bits} bits). Leave `quantization` out, or load the unquantized release."
            )
        self._layout, self._is_stored = stored or wanted, stored is not None
        if self._layout is not None:
            layers = planned_layers(self._config, self._layout)
            todo = (layer.entry for layer in layers if not layer.reason and not layer.entry.is_copy)
            self._num_weights = sum(math.prod(entry.shape) for entry in todo)
        return self._layout

    def replace(self, model: nn.Module, layout: QuantizedLayout) -> None:
        """See `Quantizer.replace`."""
        replace_layers(cast(PreTrainedModel, model), layout)

    def quantize(self, entry: Entry, record: TensorRecord) -> Mapping[str, Tensor]:
        """See `Quantizer.quantize`; besides, signs are sampled for the fingerprint of the weights read.

        Raises:
            CheckpointError: the weight is not finite.
        """
        assert self._method is not None
        name = entry.official.removesuffix(".weight")
        earlier = None if self._parts is None else self._parts.get(name)
        if earlier is not None:
            self._tell(math.prod(entry.shape))
            self._found[name] = (earlier.signal, earlier.noise, record.dtype)
            self._signs |= earlier.signs
            return earlier.tensors
        samples = _Samples(entry, FusedLayout.of(self._config))

        def read(start: int, stop: int) -> Tensor:
            rows = read_tensor(record.rows(start, stop))
            samples.look(start, rows)
            self._tell(rows.numel())
            return rows

        found = quantize_in_chunks(
            method_named(self._method), entry.shape, read, name=name, measure=self._measure
        )
        self._found[name] = (found.signal, found.noise, record.dtype)
        self._signs |= samples.signs()
        if self._parts is not None:
            self._parts.put(name, Part(found.tensors, found.signal, found.noise, samples.signs()))
        return found.tensors

    def _tell(self, count: int) -> None:
        self._num_done += count
        if self._watch is not None:
            self._watch(self._num_done, self._num_weights)

    def check(self, model: nn.Module) -> None:
        """See `Quantizer.check`; besides, the fingerprint of the weights before quantization is noted.

        Raises:
            CheckpointError: scales or zero points that cannot be right, all of them named.
        """
        config: Any = model.config
        if self._layout is None:
            return
        check_scales(model, config)
        if not self._is_stored:
            parameters = dict(model.named_parameters(remove_duplicate=False))
            names = [name for e in name_table(self._config) if not e.is_copy for name in e.native]
            signs = {n: self._signs[n] if n in self._signs else sampled_signs(parameters[n]) for n in names}
            fingerprint = signs_fingerprint(self._config, signs)
            dataclasses.replace(self._layout, source_fingerprint=fingerprint).put_into(config)


def check_scales(model: nn.Module, config: Any) -> None:
    """Refuse scales and zero points that no quantization makes.

    Args:
        model: holds layers of codes.
        config: as made by `native_config`.

    Raises:
        CheckpointError: a scale is NaN, infinite or negative, or zero where codes are not; a zero point is
            NaN or infinite. Official names are given.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    problems: dict[str, str] = {}
    for entry in name_table(config):
        kind = entry.official.rpartition(".")[2]
        if kind not in (SCALE, ZERO) or entry.is_copy:
            continue
        for name in entry.native:
            codes = parameters[f"{name.removesuffix(kind)}weight"]
            problem = _scale_problem(parameters[name], codes if kind == SCALE else None)
            if problem:
                problems.setdefault(entry.official, problem)
    if problems:
        listed = "\n".join(f"- {name}: {problem}" for name, problem in list(problems.items())[:12])
        raise CheckpointError(
            f"{len(problems)} tensors of scales cannot be right; they must be finite, and positive:\n{listed}"
            "\nThe download is damaged; fetch the weight files again."
        )


def _scale_problem(values: Tensor, codes: Tensor | None) -> str:
    """Word what is wrong, "" if nothing is; ``codes`` are given for scales, not for zero points."""
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        return f"{bad} of {values.numel()} are NaN or infinite"
    if codes is None:
        return ""
    negative = int((values < 0).sum())
    if negative:
        return f"{negative} of {values.numel()} are negative"
    is_zero = (values == 0).reshape(len(values), -1).any(1)
    empty = int((codes[is_zero] != 0).any(1).sum()) if bool(is_zero.any()) else 0
    return f"{empty} of {len(values)} rows have a zero scale but codes that are not zero" if empty else ""


class _Samples:
    """The sampled signs of the native weights behind one official one, seen a few rows at a time."""

    def __init__(self, entry: Entry, layout: FusedLayout) -> None:
        rows, columns = entry.shape
        official = torch.arange(rows)
        parts = (official,) if len(entry.native) == 1 else split_fused(official, layout)
        self._rows: dict[str, Tensor] = {}
        self._columns: dict[str, Tensor] = {}
        self._signs: dict[str, Tensor] = {}
        for name, part in zip(entry.native, parts, strict=True):
            count = len(part) * columns
            positions = torch.arange(0, count, sample_step(count))
            self._rows[name], self._columns[name] = part[positions // columns], positions % columns
            self._signs[name] = torch.zeros(len(positions), dtype=torch.bool)

    def look(self, start: int, weight_OI: Tensor) -> None:
        """Take the samples that lie in these rows, the first of which is ``start``."""
        for name, rows in self._rows.items():
            here = (rows >= start) & (rows < start + len(weight_OI))
            seen = weight_OI[rows[here] - start, self._columns[name][here]]
            self._signs[name][here] = torch.signbit(seen)

    def signs(self) -> dict[str, bytes]:
        """Return native name → what `sampled_signs` would."""
        return {name: signs.numpy().tobytes() for name, signs in self._signs.items()}
