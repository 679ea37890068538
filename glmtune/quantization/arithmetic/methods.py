"""The ways to quantize, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmtune.errors import ConfigError, unknown_name
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout

if TYPE_CHECKING:
    from torch import Tensor

    from glmtune.quantization.arithmetic.primitives import QuantizedTensor

SCALE_BITS = 16
"""Bits of a scale, and of a zero point."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to quantize a weight.

    Attributes:
        bits: per code.
        summary: one line for users.
        group_size: columns that share a scale; None: one scale per row.
        symmetric: no zero points.
        search: ranges and scales are chosen for the smallest squared error; otherwise by the largest weight.
        calibrated: rounding looks at a model's inputs (`glmtune.quantization.layers.calibrate`); a weight
            alone cannot be quantized so.
        library: another package that chooses codes, needed for quantizing only; "": none.
    """

    bits: int
    summary: str
    group_size: int | None = None
    symmetric: bool = True
    search: bool = False
    calibrated: bool = False
    library: str = ""

    def quantize(self, weight_OI: Tensor) -> QuantizedTensor:
        """Quantize rows of a weight; rows do not depend on each other.

        Args:
            weight_OI: float ``[O, I]``.
        """
        if self.library == "hqq" and self.group_size is not None:
            from glmtune.quantization.arithmetic.hqq import quantize_hqq

            return quantize_hqq(weight_OI, bits=self.bits, group_size=self.group_size)
        # Imported here, so that the settings of a command, which name methods, load without torch.
        from glmtune.quantization.arithmetic.primitives import quantize_groups, quantize_rows

        if self.group_size is None and not self.search:
            return quantize_rows(weight_OI, bits=self.bits)
        return quantize_groups(
            weight_OI,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            search=self.search,
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
        self, name: str, *, embeddings: bool = False, skipped: tuple[str, ...] = ()
    ) -> QuantizedLayout:
        """Return how a checkpoint of this method is stored."""
        return QuantizedLayout(
            self.bits, self.group_size, not self.symmetric, embeddings, skipped, method=name
        )


def _grouped(size: int) -> dict[str, Method]:
    return {
        f"int4-g{size}": Method(4, f"a scale per {size} columns, best clip", size, search=True),
        f"int4-g{size}-asym": Method(
            4, f"scale and zero point per {size} columns, best clip", size, symmetric=False, search=True
        ),
    }


METHODS: dict[str, Method] = {
    "int8": Method(8, "official INT8: one scale per row, from the largest weight"),
    "int4": Method(4, "official INT4: one scale per row, from the largest weight"),
    "int4-clip": Method(4, "official INT4 format, scales of the smallest squared error", search=True),
    **_grouped(128),
    **_grouped(64),
    **_grouped(32),
    "int4-gptq": Method(4, "official INT4 format, rounding calibrated by GPTQ", search=True, calibrated=True),
    "int4-g64-gptq": Method(
        4, "a scale per 64 columns, rounding calibrated by GPTQ", 64, search=True, calibrated=True
    ),
}
"""Name → method. Those without groups (``-g``) are stored in the official format."""

OPTIONAL: dict[str, Method] = {
    "int4-g64-hqq": Method(
        4, "scale and zero point per 64 columns by HQQ", 64, symmetric=False, library="hqq"
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


def method_named(name: str) -> Method:
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
