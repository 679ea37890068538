"""What quantization did to every layer of a model: replaced or skipped, why, and at what loss.

Layers carry sums of squares, not dB: sums can be added up over the layers of a kind, means of dB could not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from glmtune.quantization.arithmetic.methods import QuantizationMethod
from glmtune.quantization.arithmetic.primitives import sqnr_db
from glmtune.quantization.layers.plan import PlannedLayer


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer.

    Attributes:
        name: official name.
        shape: of its weight.
        replaced: its weight is codes now.
        reason: the method, or why the layer was left as it was.
        bits_per_weight: scales and zero points included; of a skipped layer: of its floating type.
        signal: sum of squares of the weight; 0 where it was not measured.
        noise: sum of squares of what quantization changed.
    """

    name: str
    shape: tuple[int, ...]
    replaced: bool
    reason: str
    bits_per_weight: float
    signal: float = 0.0
    noise: float = 0.0

    @property
    def kind(self) -> str:
        """Its name inside a block, such as ``dense_h_to_4h``."""
        return self.name.rpartition(".")[2]

    @property
    def num_weights(self) -> int:
        """Numbers in its weight."""
        return math.prod(self.shape)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise of its weight, dB; None where it was not measured."""
        return sqnr_db(self.signal, self.noise) if self.replaced and self.signal else None


@dataclass(frozen=True, slots=True)
class KindReport:
    """All layers of one kind (such as ``dense_h_to_4h``) summed up.

    Attributes:
        kind: name inside a block.
        num_replaced: how many are codes.
        num_skipped: how many are not.
        bits_per_weight: mean over all their weights.
        sqnr_db: of the replaced ones, dB; None where nothing was measured.
        worst: the replaced layer with the lowest SQNR, its official name; "" where nothing was measured.
    """

    kind: str
    num_replaced: int
    num_skipped: int
    bits_per_weight: float
    sqnr_db: float | None
    worst: str


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """All layers with a matrix, in the order of the model.

    Attributes:
        method: name of the method.
        layers: one entry each.
        measured: what signal and noise are those of: ``weights``, or ``outputs`` on calibration rows.
    """

    method: str
    layers: tuple[LayerReport, ...]
    measured: str = "weights"

    @property
    def bits_per_weight(self) -> float:
        """Mean over the weights of all layers listed, skipped ones included."""
        return _mean_bits(self.layers)

    def kinds(self) -> tuple[KindReport, ...]:
        """Summarize the layers by kind, in order of first appearance."""
        groups: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            groups.setdefault(layer.kind, []).append(layer)
        return tuple(_summary(kind, layers) for kind, layers in groups.items())

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        layers = [asdict(layer) | {"kind": layer.kind, "sqnr_db": layer.sqnr_db} for layer in self.layers]
        kinds = [asdict(kind) for kind in self.kinds()]
        return {
            "method": self.method,
            "measured": self.measured,
            "bits_per_weight": self.bits_per_weight,
            "kinds": kinds,
            "layers": layers,
        }


def layer_report(
    layer: PlannedLayer,
    name: str,
    method: QuantizationMethod,
    dtype: torch.dtype,
    signal: float,
    noise: float,
) -> LayerReport:
    """Report on a planned layer.

    Args:
        layer: from the plan.
        name: of the method.
        method: how it was quantized, if it was.
        dtype: of its weight before.
        signal: see `LayerReport`.
        noise: see `LayerReport`.
    """
    shape, replaced = layer.entry.shape, not layer.reason
    bits = method.bits_per_weight(shape[1]) if replaced else 8.0 * dtype.itemsize
    return LayerReport(layer.name, shape, replaced, layer.reason or name, bits, signal, noise)


def _summary(kind: str, layers: list[LayerReport]) -> KindReport:
    replaced = [layer for layer in layers if layer.replaced]
    measured = [layer for layer in replaced if layer.sqnr_db is not None]
    signal, noise = sum(layer.signal for layer in measured), sum(layer.noise for layer in measured)
    return KindReport(
        kind=kind,
        num_replaced=len(replaced),
        num_skipped=len(layers) - len(replaced),
        bits_per_weight=_mean_bits(layers),
        sqnr_db=sqnr_db(signal, noise) if measured else None,
        worst=min(measured, key=lambda layer: layer.sqnr_db or 0.0).name if measured else "",
    )


def _mean_bits(layers: Iterable[LayerReport]) -> float:
    listed = list(layers)
    total = sum(layer.num_weights for layer in listed)
    return sum(layer.bits_per_weight * layer.num_weights for layer in listed) / max(1, total)
