"""Settings of the base model: where it comes from, in which type and on which device it runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from glmtune.errors import ConfigError
from glmtune.models.releases.families import parse_family
from glmtune.settings import check_choice, setting

DTYPES = ("auto", "float32", "bfloat16", "float16")
ACTIVATIONS = ("int8",)
KV_CACHES = ("plain", "int8")
"""How the keys and values of earlier tokens are kept: in the model's type, or as INT8 codes."""


@dataclass(frozen=True)
class ModelSettings:
    """Which base model to load, and how."""

    source: str = setting("glm-tiny", "preset name, hub id (THUDM/, zai-org/), modelscope:NAME, or a folder")
    dtype: str = setting(
        "auto", "auto, float32, bfloat16 or float16; auto keeps the checkpoint's where it runs well"
    )
    device: str = setting("auto", "auto (CUDA if there is one), cpu, cuda or cuda:N")
    family: str | None = setting(None, "release line, only if names cannot tell it, such as chatglm2-32k")
    quantization: str | None = setting(
        None, "quantize on loading: int8, int4, int4-clip, int4-g128, nf4, ... (stored codes load without it)"
    )
    quantization_bit: int | None = setting(None, "4 or 8: int4 or int8, as in the official scripts")
    quantization_activations: str | None = setting(
        None, "int8: round the inputs of quantized layers too (faster prompts on CPUs, other numbers)"
    )

    @property
    def method(self) -> str | None:
        """The quantization asked for, by either of its settings."""
        return self.quantization if self.quantization_bit is None else f"int{self.quantization_bit}"

    @property
    def described(self) -> str:
        """The source and how it is quantized on loading, in words."""
        return self.source if self.method is None else f"{self.source}, quantized to {self.method}"

    def __post_init__(self) -> None:
        """Check the fields that need no model."""
        if self.quantization_bit not in (None, 4, 8):
            raise ConfigError(
                f"`model.quantization_bit` is {self.quantization_bit}, but it must be 4 or 8, or null."
            )
        if self.quantization is not None and self.quantization_bit is not None:
            raise ConfigError(
                f"`model.quantization` is `{self.quantization}` and `model.quantization_bit` is "
                f"{self.quantization_bit}, which say the same thing twice. Leave one of them out."
            )
        if self.quantization_activations is not None:
            check_choice("model.quantization_activations", self.quantization_activations, ACTIVATIONS)
        check_choice("model.dtype", self.dtype, DTYPES)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"`model.device` is `{self.device}`, but it must be auto, cpu, cuda or cuda:N.")
        if not self.source.strip():
            raise ConfigError("`model.source` is empty, but it must be a preset name, a hub id or a folder.")
        if self.family is not None:
            parse_family(self.family)


@dataclass(frozen=True)
class CheckpointSettings:
    """Which checkpoint to look at, without loading it as a whole."""

    source: str | None = setting(None, "preset name, hub id (THUDM/, zai-org/), modelscope:NAME, or a folder")
    family: str | None = setting(None, "release line, only if names cannot tell it, such as chatglm2-32k")

    def __post_init__(self) -> None:
        """Check the family's name."""
        if self.family is not None:
            parse_family(self.family)
