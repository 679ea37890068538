"""Settings of quantization: the method, and what is left out."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.errors import ConfigError
from glmtune.quantization.arithmetic.methods import method_named
from glmtune.settings import setting

DEFAULT_METHOD = "int4"


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
    embeddings: bool = setting(False, "quantize embedding and head too (ChatGLM-6B only)")

    def __post_init__(self) -> None:
        """Check the method's name.

        Raises:
            ConfigError: no such method.
        """
        if self.method is not None:
            method_named(self.method)


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
