"""Quantize while a checkpoint is read, tensor by tensor; check what a quantized checkpoint holds.

A model of 6B weights is 12 GB in half precision and 3.5 GB in INT4. Were it loaded first and quantized then,
the machine would need the 12 GB. Here no weight is ever whole in floating point: a reader
(`glmtune.models.load`) builds the model on the meta device, `replace` puts layers of codes in it, and for
each stored weight `quantize` reads some rows, turns them into codes and drops them. The peak is the codes,
the layers that stay floating point, and a chunk.

The weights before quantization have a fingerprint, which prefixes and adapters name as their base. As they
are never in memory together, the signs it is made of are sampled from the rows on their way (`_SignSamples`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.checkpoints.fingerprint import (
    fingerprinted_names,
    sample_step,
    sampled_signs,
    signs_fingerprint,
)
from glmtune.models.checkpoints.headers import TensorRecord
from glmtune.models.checkpoints.names import Entry, FusedLayout, name_table, split_fused
from glmtune.models.checkpoints.quantized_layout import SCALE, ZERO, QuantizedLayout
from glmtune.models.checkpoints.shards import OpenShards
from glmtune.quantization.arithmetic.chunking import quantize_in_chunks
from glmtune.quantization.arithmetic.methods import method_named
from glmtune.quantization.layers.apply import note_outer_signs, replace_layers, with_outer_signs
from glmtune.quantization.layers.finished_layers import FinishedLayer, FinishedLayers
from glmtune.quantization.layers.plan import plain_config, plan_layout, planned_layers
from glmtune.quantization.layers.report import LayerReport, QuantizationReport, layer_report


class QuantizingReader:
    """Fills a model with layers of codes: from a quantized checkpoint, or by quantizing one as it is read.

    Implements `glmtune.models.checkpoints.quantizer.Quantizer`; use one for one model.
    """

    def __init__(
        self,
        method: str | None = None,
        *,
        skip: tuple[str, ...] = (),
        embeddings: bool | str = False,
        measure: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
        finished: FinishedLayers | None = None,
    ) -> None:
        """Say what is wanted.

        Args:
            method: a name in `METHODS`; None: as the checkpoint is stored.
            skip: see `plan_layout`.
            embeddings: see `plan_layout`.
            measure: compare every weight with its codes, for the report.
            on_progress: called as rows are quantized, with the number of weights done and of all weights.
            finished: keeps every layer, and gives those that an earlier run finished.

        Raises:
            ConfigError: no such method.
        """
        if method is not None:
            method_named(method)
        self._on_progress, self._num_done, self._num_weights = on_progress, 0, 0
        self._method, self._skip, self._embeddings, self._measure = method, skip, embeddings, measure
        self._finished, self._config = finished, cast(Any, None)
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
                name = layout.of_layer(layer.name).method
                layers.append(layer_report(layer, name, method_named(name), dtype, signal, noise))
        return QuantizationReport(self._method, tuple[LayerReport, ...](layers))

    def layout(self, stored: QuantizedLayout | None, config: Any) -> QuantizedLayout | None:
        """See `Quantizer.layout`.

        Raises:
            ConfigError: the checkpoint is stored in another way than was asked for; see `plan_layout`.
        """
        self._config = plain_config(config)
        wanted = None
        if self._method is not None:
            embeddings = self._embeddings if stored is None else False
            wanted = plan_layout(self._config, self._method, skip=self._skip, embeddings=embeddings)
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

    def quantize(self, entry: Entry, record: TensorRecord, shards: OpenShards) -> Mapping[str, Tensor]:
        """See `Quantizer.quantize`; besides, signs are sampled for the fingerprint of the weights read.

        Raises:
            CheckpointError: the weight is not finite.
        """
        assert self._layout is not None
        name = entry.official.removesuffix(".weight")
        earlier = None if self._finished is None else self._finished.get(name)
        if earlier is not None:  # its weight is not read again, so its signs come from the earlier run, too
            self._count(math.prod(entry.shape))
            self._found[name] = (earlier.signal, earlier.noise, record.dtype)
            self._signs |= earlier.signs
            return earlier.tensors
        samples = _SignSamples(entry, FusedLayout.of(self._config))

        def read(start: int, stop: int) -> Tensor:
            rows = shards.read(record.rows(start, stop))
            samples.look(start, rows)
            self._count(rows.numel())
            return rows

        method = method_named(self._layout.of_layer(name).method)
        found = quantize_in_chunks(method, entry.shape, read, name=name, measure=self._measure)
        self._found[name] = (found.signal, found.noise, record.dtype)
        self._signs |= samples.signs()
        if self._finished is not None:
            self._finished.put(name, FinishedLayer(found.tensors, found.signal, found.noise, samples.signs()))
        return found.tensors

    def _count(self, count: int) -> None:
        self._num_done += count
        if self._on_progress is not None:
            self._on_progress(self._num_done, self._num_weights)

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
            names = fingerprinted_names(self._config)
            # Weights that stayed floating point are in the model; of the others the
            # signs were sampled on reading.
            signs = {n: self._signs[n] if n in self._signs else sampled_signs(parameters[n]) for n in names}
            fingerprint = signs_fingerprint(self._config, signs)
            layout = dataclasses.replace(self._layout, source_fingerprint=fingerprint)
            with_outer_signs(layout, self._config, signs.__getitem__).put_into(config)
        note_outer_signs(cast(PreTrainedModel, model))


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
        suffix = entry.official.rpartition(".")[2]
        if suffix not in (SCALE, ZERO) or entry.is_copy:
            continue
        for name in entry.native:
            codes = parameters[f"{name.removesuffix(suffix)}weight"]
            problem = _scale_problem(parameters[name], codes if suffix == SCALE else None)
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
    # Released files have zero scales where a whole row was zero; anywhere else they
    # would erase a row in silence.
    is_zero = (values == 0).reshape(len(values), -1).any(1)
    empty = int((codes[is_zero] != 0).any(1).sum()) if bool(is_zero.any()) else 0
    return f"{empty} of {len(values)} rows have a zero scale but codes that are not zero" if empty else ""


class _SignSamples:
    """The sampled signs of the native weights behind one official one, seen a few rows at a time.

    A fingerprint is made of native weights (query, key and value apart), but rows come in official order
    (fused, perhaps interleaved by head). So row numbers are split as the weight would be; the result says in
    which official row each sample of a native weight lies.
    """

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
