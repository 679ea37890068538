"""Settings of the base model: where it comes from, in which type and on which device it runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from glmtune.errors import ConfigError
from glmtune.models.releases.families import parse_family
from glmtune.settings import check_choice, check_range, setting

DTYPES = ("auto", "float32", "bfloat16", "float16")
ACCELERATORS = {"cuda": "CUDA", "npu": "NPU", "xpu": "XPU", "mps": "MPS"}
"""Devices beside the CPU, and what their makers call them; `auto` takes the first there is. An NPU comes
before an XPU, since whoever has one bought it for this, while PyTorch sees as XPU also the graphics unit of
many processors; MPS last, which every Mac has."""
DEVICE = rf"auto|cpu|({'|'.join(ACCELERATORS)})(:[0-9]{{1,4}})?"
DEVICE_RULE = "auto, cpu, cuda or cuda:N (or xpu, npu, mps in its place)"
ACTIVATIONS = ("int8",)
EMBEDDINGS = ("int8",)
SPLITS = ("auto", "balanced", "sequential")
"""How a model is split by layers: ``auto`` is ``balanced``; ``sequential`` fills a device before the next."""
KV_CACHES = ("plain", "int8")
"""How the keys and values of earlier tokens are kept: in the model's type, or as INT8 codes."""


@dataclass(frozen=True)
class ModelSettings:
    """Which base model to load, and how."""

    source: str = setting("glm-tiny", "preset name, hub id (THUDM/, zai-org/), modelscope:NAME, or a folder")
    dtype: str = setting(
        "auto", "auto, float32, bfloat16 or float16; auto keeps the checkpoint's where it runs well"
    )
    device: str = setting(
        "auto", "auto (CUDA, NPU, XPU or MPS if there is one), cpu, cuda, cuda:N, npu, xpu, mps"
    )
    device_map: str | None = setting(
        None, "auto or balanced splits the model by layers over all GPUs, sequential fills one by one"
    )
    num_gpus: int | None = setting(None, "splits the model over so many GPUs, as in the official demos")
    family: str | None = setting(None, "release line, only if names cannot tell it, such as chatglm2-32k")
    quantization: str | None = setting(
        None, "quantize on loading: int8, int4, int4-clip, int4-g128, nf4, ... (stored codes load without it)"
    )
    quantization_bit: int | None = setting(None, "4 or 8: int4 or int8, as in the official scripts")
    verify_checksums: bool = setting(
        True, "refuse damaged files: .bin by the checksums in them, checkpoints of glmtune by their manifest"
    )
    quantization_activations: str | None = setting(
        None, "int8: round the inputs of quantized layers too (faster prompts on CPUs, other numbers)"
    )
    quantization_embeddings: str | None = setting(
        None, "int8: embedding and head as INT8 codes, rounded on loading (less memory, faster answers)"
    )

    @property
    def method(self) -> str | None:
        """The quantization asked for, by either of its settings."""
        return self.quantization if self.quantization_bit is None else f"int{self.quantization_bit}"

    @property
    def makes_codes(self) -> bool:
        """Whether weights become codes on loading."""
        return self.method is not None or self.quantization_embeddings is not None

    @property
    def is_split(self) -> bool:
        """Whether the model is to be split over several devices."""
        return self.device_map is not None or self.num_gpus is not None

    @property
    def where(self) -> dict[str, Any]:
        """Where it goes and how its files are read, as arguments of `glmtune.loading.load_base`."""
        reading = {"verify_checksums": self.verify_checksums}
        if self.is_split:
            return {"device_map": self.device_map or SPLITS[0], "num_gpus": self.num_gpus} | reading
        return {"device": self.device} | reading

    @property
    def described(self) -> str:
        """The source and how it is quantized on loading, in words."""
        found = self.source if self.method is None else f"{self.source}, quantized to {self.method}"
        return found if self.quantization_embeddings is None else f"{found}, embedding and head in INT8"

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
        if self.quantization_embeddings is not None:
            check_choice("model.quantization_embeddings", self.quantization_embeddings, EMBEDDINGS)
        check_choice("model.dtype", self.dtype, DTYPES)
        if self.device_map is not None:
            check_choice("model.device_map", self.device_map, SPLITS)
        if self.num_gpus is not None:
            check_range("model.num_gpus", self.num_gpus, low=1)
        if self.is_split and self.device != "auto":
            raise ConfigError(
                f"`model.device` is `{self.device}`, and `model.device_map` or `model.num_gpus` asks for all"
                " devices, or so many. Leave one of the two out."
            )
        if not re.fullmatch(DEVICE, self.device):
            raise ConfigError(f"`model.device` is `{self.device}`, but it must be {DEVICE_RULE}.")
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
