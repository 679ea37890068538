"""Settings of quantization: the method, and what is left out."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.errors import ConfigError
from glmtune.models.checkpoints.quantized_layout import INT8_EMBEDDINGS
from glmtune.quantization.arithmetic.methods import method_named
from glmtune.settings import check_choice, setting

DEFAULT_METHOD = "int4"
EMBEDDINGS: dict[str, bool | str] = {INT8_EMBEDDINGS: INT8_EMBEDDINGS, "true": True, "false": False}
"""Values of `quantization.embeddings`: what embedding and head become."""


@dataclass(frozen=True)
class QuantizationSettings:
    """How weights become codes."""

    method: str | None = setting(
        None,
        "official formats: int8, int4 (default), int4-clip, int4-gptq; own: int4-g128|g64|g32, each also "
        "with -asym, int4-g64-gptq, and int4-g64-hqq",
    )
    skip: list[str] = setting(
        list, "layers left as they are: official names, * patterns, or kinds such as dense"
    )
    embeddings: str | None = setting(
        None,
        "int8: embedding and head as INT8 codes, too (glmtune's own format); true: in the width of the "
        "blocks, as ChatGLM-6B's official format has them",
    )

    def __post_init__(self) -> None:
        """Check the method's name.

        Raises:
            ConfigError: no such method; embedding and head cannot be so.
        """
        if self.method is not None:
            method_named(self.method)
        if self.embeddings is not None and str(self.embeddings).lower() not in EMBEDDINGS:
            check_choice("quantization.embeddings", self.embeddings, tuple(EMBEDDINGS))

    @property
    def layout_embeddings(self) -> bool | str:
        """What embedding and head become, as `plan_layout` takes it."""
        return EMBEDDINGS[str(self.embeddings).lower()] if self.embeddings is not None else False


def chosen_method(method: str | None, bits: int | None) -> str:
    """Return the method that a name or a bit width asks for; a width alone is the official format.

    Args:
        method: a name in ``METHODS``, or None.
        bits: 4 or 8, or None.

    Raises:
        ConfigError: neither 4 nor 8 bits; the two contradict each other.

    >>> chosen_method(None, 8), chosen_method("int4-g64", 4), chosen_method(None, None)
    ('int8', 'int4-g64', 'int4')
    """
    if bits not in (None, 4, 8):
        raise ConfigError(f"`bits` is {bits}, but it must be 4 or 8.")
    if method is None:
        return DEFAULT_METHOD if bits is None else f"int{bits}"
    if bits is not None and method_named(method).bits != bits:
        raise ConfigError(
            f"`bits` is {bits}, but `quantization.method` is `{method}`, of {method_named(method).bits}. "
            "Leave one out."
        )
    return method
