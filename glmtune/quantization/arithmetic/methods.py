"""The ways to quantize, by name: what `quantization=NAME` stands for.

Names are stored in config.json of quantized folders, so they never change their meaning.
torch is imported inside functions only: the settings of every command name methods, and
``glmtune --help`` must not wait for torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from glmtune.errors import ConfigError, unknown_name
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout

if TYPE_CHECKING:
    from torch import Tensor

    from glmtune.quantization.arithmetic.primitives import QuantizedTensor

SCALE_BITS = 16
"""Bits of a scale, and of a zero point."""


Algorithm = Literal["range", "search", "gptq", "hqq"]
"""How codes and scales are found. ``range``: the largest weight of a row becomes the largest code, as in the
releases; ``search``: the range of the smallest squared error (`quantize_groups`); ``gptq``: calibrated
rounding (`quantize_gptq`), with scales by search; ``hqq``: the package of that name (`quantize_hqq`)."""


@dataclass(frozen=True, slots=True)
class QuantizationMethod:
    """One way to quantize a weight.

    Attributes:
        bits: per code.
        summary: one line for users.
        group_size: columns that share a scale; None: one scale per row.
        symmetric: no zero points.
        algorithm: how codes and scales are found.
    """

    bits: int
    summary: str
    group_size: int | None = None
    symmetric: bool = True
    algorithm: Algorithm = "search"

    @property
    def calibrated(self) -> bool:
        """Whether rounding looks at a model's inputs, so that a weight alone does not suffice."""
        return self.algorithm == "gptq"

    @property
    def library(self) -> str:
        """Another package that is needed for quantizing (not for loading); "": none."""
        return "hqq" if self.algorithm == "hqq" else ""

    def quantize(self, weight_OI: Tensor) -> QuantizedTensor:
        """Quantize rows of a weight by the weight alone; rows do not depend on each other.

        Args:
            weight_OI: float ``[O, I]``.

        Returns:
            Codes, scales and zero points. Of a calibrated method these are codes in its format by plain
            search; `glmtune.quantization.layers.calibrate` makes the calibrated ones.
        """
        if self.algorithm == "hqq" and self.group_size is not None:
            from glmtune.quantization.arithmetic.hqq import quantize_hqq

            return quantize_hqq(weight_OI, bits=self.bits, group_size=self.group_size)
        from glmtune.quantization.arithmetic.primitives import quantize_groups, quantize_rows

        if self.algorithm == "range":
            return quantize_rows(weight_OI, bits=self.bits)
        return quantize_groups(
            weight_OI, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric
        )

    def bits_per_weight(self, in_features: int) -> float:
        """Return bits per weight, scales and zero points included.

        Args:
            in_features: columns of the weight.
        """
        groups = 1 if self.group_size is None else -(-in_features // self.group_size)
        stored = 1 if self.symmetric else 2
        return self.bits + groups * stored * SCALE_BITS / in_features

    def layout(
        self, name: str, *, embeddings: bool | str = False, skipped: tuple[str, ...] = ()
    ) -> QuantizedLayout:
        """Return how a checkpoint of this method is stored."""
        return QuantizedLayout(
            self.bits, self.group_size, not self.symmetric, embeddings, skipped, method=name
        )


def _grouped(size: int) -> dict[str, QuantizationMethod]:
    return {
        f"int4-g{size}": QuantizationMethod(4, f"a scale per {size} columns, best clip", size),
        f"int4-g{size}-asym": QuantizationMethod(
            4, f"scale and zero point per {size} columns, best clip", size, symmetric=False
        ),
    }


METHODS: dict[str, QuantizationMethod] = {
    "int8": QuantizationMethod(
        8, "official INT8: one scale per row, from the largest weight", algorithm="range"
    ),
    "int4": QuantizationMethod(
        4, "official INT4: one scale per row, from the largest weight", algorithm="range"
    ),
    "int4-clip": QuantizationMethod(4, "official INT4 format, scales of the smallest squared error"),
    **_grouped(128),
    **_grouped(64),
    **_grouped(32),
    "int4-gptq": QuantizationMethod(4, "official INT4 format, rounding calibrated by GPTQ", algorithm="gptq"),
    "int4-g64-gptq": QuantizationMethod(
        4, "a scale per 64 columns, rounding calibrated by GPTQ", 64, algorithm="gptq"
    ),
}
"""Name → method. Those without groups (``-g``) are stored in the official format."""

OPTIONAL: dict[str, QuantizationMethod] = {
    "int4-g64-hqq": QuantizationMethod(
        4, "scale and zero point per 64 columns by HQQ", 64, symmetric=False, algorithm="hqq"
    ),
}
"""Name → method that needs another package for quantizing; what it wrote loads without."""


@dataclass(frozen=True, slots=True)
class ExternalMethod:
    """A way to quantize that another library has; on loading only, see `glmtune.quantization.files.external`.

    Attributes:
        library: its package.
        bits: per code.
        bits_per_weight: scales and zero points included, of a wide layer.
        summary: one line for users.
        needs_gpu: it computes on CUDA GPUs only.
    """

    library: str
    bits: int
    bits_per_weight: float
    summary: str
    needs_gpu: bool = True


EXTERNAL: dict[str, ExternalMethod] = {
    "nf4": ExternalMethod(
        "bitsandbytes", 4, 4.127, "16 levels of a normal distribution, scales quantized too"
    ),
    "torchao-int4": ExternalMethod("torchao", 4, 4.25, "scale and zero point per 128 columns, GPU kernels"),
    "torchao-int8": ExternalMethod("torchao", 8, 8.004, "a scale per row", needs_gpu=False),
}
"""Name → method of another library."""


def method_named(name: str) -> QuantizationMethod:
    """Return a method of our own.

    Raises:
        ConfigError: no method has that name, nearest first, or it is another library's.
    """
    if name in EXTERNAL:
        raise ConfigError(
            f"`quantization` is `{name}`, which {EXTERNAL[name].library} applies to a loaded model; it "
            "cannot be written or planned. Use it with train, predict, eval and chat, or `int4-g64` here."
        )
    known = METHODS | OPTIONAL
    if name not in known:
        raise ConfigError(unknown_name("`quantization`", name, [*known, *EXTERNAL]))
    return known[name]
