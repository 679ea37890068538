"""Settings of a comparison: who is compared, what a candidate may lose, and how sure one must be."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmtune.errors import ConfigError
from glmtune.settings import (
    SCALE_HELP,
    STRENGTH_HELP,
    check_choice,
    check_range,
    check_strengths,
    setting,
)

if TYPE_CHECKING:
    from glmtune.models.settings import ModelSettings

PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
NOT_QUANTIZED = "none"
SUFFIXES = {"-a8": "quantization_activations", "-e8": "quantization_embeddings"}
"""Ends of a method's name, in any order: the setting of the model that they make ``int8``."""
HEADLINE = "headline"
AVERAGES = (HEADLINE, "micro", "macro")


@dataclass(frozen=True)
class GateSettings:
    """The tolerance that decides whether a candidate may ship."""

    max_drop_pp: float = setting(1.0, "percentage points that the candidate may lose, per benchmark")
    confidence: float = setting(0.95, "of the one-sided verdict and of the two-sided intervals")
    average: str = setting(HEADLINE, "which average is judged: headline (the published one), micro or macro")
    num_resamples: int = setting(10_000, "draws of the bootstrap")
    seed: int = setting(0, "of the bootstrap")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value is out of its range.
        """
        check_range("gate.max_drop_pp", self.max_drop_pp, low=0, high=99)
        check_range("gate.confidence", self.confidence, low=0.5, high=0.9999)
        check_choice("gate.average", self.average, AVERAGES)
        check_range("gate.num_resamples", self.num_resamples, low=100)
        check_range("gate.seed", self.seed, low=0)


@dataclass(frozen=True)
class ImportSettings:
    """Which figures of another tool's runs count."""

    metric: str | None = setting(
        None, "of lm-evaluation-harness, where a task has several: acc_norm, ...; default: its first"
    )
    filter: str | None = setting(
        None, "of lm-evaluation-harness, where a file has several: flexible-extract, ...; default: its first"
    )


@dataclass(frozen=True)
class SideSettings:
    """In what one side of a comparison differs from the model that both share."""

    source: str | None = setting(None, "another base: preset, hub id or folder; default: model.source")
    quantization: str | None = setting(
        None, "int8, int4, int4-g128, int4-a8, ...; bf16, fp16 or fp32: not quantized, in this type; none"
    )
    dtype: str | None = setting(
        None, "type of what is not quantized; default: the baseline's, or model.dtype"
    )
    quantization_activations: str | None = setting(
        None, "int8: round the inputs of quantized layers too; default: model.quantization_activations"
    )
    quantization_embeddings: str | None = setting(
        None, "int8: embedding and head as INT8 codes; default: model.quantization_embeddings"
    )
    prefix_path: str | None = setting(None, "tuned prefix: a run folder, one of its checkpoints, or a file")
    prefix_strength: float = setting(1.0, STRENGTH_HELP)
    adapter_path: str | None = setting(None, "LoRA adapter: a run folder or one of its checkpoints")
    adapter_scale: float = setting(1.0, SCALE_HELP)
    use_switch: bool = setting(
        True, "obey the switch of what was tuned, if it has one; false: it applies to every prompt"
    )

    def __post_init__(self) -> None:
        """Check the fields against each other.

        Raises:
            ConfigError: two of them say different things about the same.
        """
        if self.prefix_path is not None and self.adapter_path is not None:
            raise ConfigError(
                f"`prefix_path` is `{self.prefix_path}` and `adapter_path` `{self.adapter_path}` on the same"
                " side, but a model is tuned one way. Leave one out."
            )
        if not self.use_switch and self.prefix_path is None and self.adapter_path is None:
            raise ConfigError(
                "`use_switch` is False on a side where nothing that was tuned is given, which could have a"
                " switch. Leave it out."
            )
        check_strengths(
            prefix=self.prefix_path,
            prefix_strength=self.prefix_strength,
            adapter=self.adapter_path,
            adapter_scale=self.adapter_scale,
        )
        if self.quantization in PRECISIONS and self.dtype not in (None, PRECISIONS[self.quantization]):
            raise ConfigError(
                f"`quantization` is `{self.quantization}` and `dtype` is `{self.dtype}` on the same side,"
                " which contradict each other. Leave one out."
            )

    def applied_to(self, shared: ModelSettings) -> ModelSettings:
        """Return the model of this side.

        Args:
            shared: what both sides have in common.

        Raises:
            ConfigError: a value that no model has.
        """
        changes: dict[str, str | None] = {"source": self.source or shared.source}
        dtype = self.dtype or PRECISIONS.get(self.quantization or "")
        if dtype is not None:
            changes["dtype"] = dtype
        if self.quantization is not None:
            is_plain = self.quantization in (*PRECISIONS, NOT_QUANTIZED)
            # What the model settings say about rounding was said of a quantized model.
            if is_plain:
                changes |= dict.fromkeys(SUFFIXES.values())
            method, rounded = split_suffixes(self.quantization)
            changes |= {"quantization": None if is_plain else method, "quantization_bit": None}
            changes |= dict.fromkeys(rounded, "int8")
        for name in SUFFIXES.values():
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name)
        return dataclasses.replace(shared, **changes)


def split_suffixes(name: str) -> tuple[str, tuple[str, ...]]:
    """Take what rounds besides off a method's name.

    >>> split_suffixes("int4-g32-a8-e8")
    ('int4-g32', ('quantization_embeddings', 'quantization_activations'))
    """
    settings: list[str] = []
    while (end := next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)) is not None:
        name, settings = name.removesuffix(end), [*settings, SUFFIXES[end]]
    return name, tuple(settings)
