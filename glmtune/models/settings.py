"""Settings of the base model: where it comes from, in which type and on which device it runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from glmtune.errors import ConfigError
from glmtune.models.families import parse_family
from glmtune.settings import check_choice, setting

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelSettings:
    """Which base model to load, and how."""

    source: str = setting("glm-tiny", "preset name, hub id (THUDM/, zai-org/), modelscope:NAME, or a folder")
    dtype: str = setting(
        "auto", "auto, float32, bfloat16 or float16; auto keeps the checkpoint's where it runs well"
    )
    device: str = setting("auto", "auto (CUDA if there is one), cpu, cuda or cuda:N")
    family: str | None = setting(None, "release line, only if names cannot tell it, such as chatglm2-32k")

    def __post_init__(self) -> None:
        """Check the fields that need no model."""
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
