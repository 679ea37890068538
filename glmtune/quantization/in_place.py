"""Quantization of a model that is loaded already: what `model.quantize(bits)` does, and `generate` keeps."""

from __future__ import annotations

from typing import Any

from glmtune.errors import ConfigError
from glmtune.quantization.kernels.dispatch import prepare_for_inference
from glmtune.quantization.layers.apply import quantize_model
from glmtune.quantization.layers.linear import QuantizedLinear


class InPlaceQuantization:
    """Implements `glmtune.models.official.InPlaceQuantizer`.

    Attributes:
        activations: what inputs of layers of codes are rounded to, see `prepare_for_inference`.
    """

    def __init__(self, activations: str | None = None) -> None:
        """Keep what inputs become."""
        self.activations = activations

    def quantize(self, model: Any, bits: int) -> None:
        """Turn the linear layers of a model's blocks into the official format of 4 or 8 bits.

        Args:
            model: an official model in floating point, mutated.
            bits: 4 or 8.

        Raises:
            ConfigError: it is quantized already, or an adapter wraps its layers.
            CheckpointError: a weight is not finite.
        """
        if model.quantization is not None:
            raise ConfigError(
                f"`model.quantize({bits})` was asked of a model that is quantized already "
                f"(`{model.quantization}`). Load its unquantized release to quantize anew."
            )
        if any(".base_layer." in name for name, _ in model.named_parameters()):
            raise ConfigError(
                f"`model.quantize({bits})` was asked of a model whose layers an adapter wraps. Quantize on "
                f"loading: `glmtune.load_model(source, quantization='int{bits}', adapter=FOLDER)`."
            )
        quantize_model(model, f"int{bits}", stored_dtype=model.stored_dtype)

    def prepare(self, model: Any) -> None:
        """Give layers of codes the fastest products; a model without such layers stays as it is."""
        if any(isinstance(module, QuantizedLinear) for module in model.modules()):
            prepare_for_inference(model, activations=self.activations)
