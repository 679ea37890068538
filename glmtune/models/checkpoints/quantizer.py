"""What loading asks of quantization, as a Protocol: models stand below `glmtune.quantization`.

`glmtune.quantization.files.quantize_on_load.QuantizingReader` implements it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from glmtune.models.checkpoints.headers import TensorRecord
from glmtune.models.checkpoints.names import Entry
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.models.checkpoints.shards import OpenShards


class Quantizer(Protocol):
    """What a loader needs to know to fill a model with quantized layers; called in the order given here."""

    def layout(self, stored: QuantizedLayout | None, config: Any) -> QuantizedLayout | None:
        """Decide how the model will hold its weights.

        Args:
            stored: how the checkpoint holds them; None: as floating point numbers.
            config: as made by `native_config`.

        Returns:
            The layout; None: the model holds floating point numbers, and nothing else is called but `check`.
        """
        ...

    def replace(self, model: nn.Module, layout: QuantizedLayout) -> None:
        """Put layers of codes in the place of a model's linear ones; on the meta device."""
        ...

    def quantize(self, entry: Entry, record: TensorRecord, shards: OpenShards) -> Mapping[str, Tensor]:
        """Quantize one stored weight; not called where the checkpoint holds codes already.

        Args:
            entry: which weight.
            record: where it lies; read a few rows at a time, see `TensorRecord.rows`.
            shards: reads it.

        Returns:
            ``weight``, ``weight_scale`` and, if the layout has it, ``weight_zero``, official rows.
        """
        ...

    def check(self, model: nn.Module) -> None:
        """Refuse what was read if scales or zero points cannot be right."""
        ...
