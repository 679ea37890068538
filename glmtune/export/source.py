"""What an export is made of: what was asked for, whether a format can hold it, and the source to read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from glmtune.adapter import find_adapter, load_adapter
from glmtune.errors import ConfigError
from glmtune.export.gguf.folder import Written, check_gguf
from glmtune.export.gguf.types import DEFAULT_TYPE
from glmtune.export.streamed import stream_weights
from glmtune.export.tensors import (
    dequantized_tensors,
    is_adapted,
    merge_adapter,
    native_tensors,
    stored_dtype,
)
from glmtune.models.checkpoints.fingerprint import weights_fingerprint
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout, without_layout
from glmtune.models.checkpoints.shards import OpenShards
from glmtune.models.checkpoints.transformers_format import (
    is_transformers_format,
    unofficial,
)
from glmtune.models.load import build_model, load_config
from glmtune.models.placeholders import build_of_placeholders
from glmtune.models.releases.families import Family, family_of_config
from glmtune.models.releases.source import resolve_source
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.checkpoint import check_official, find_prefix, load_prefix
from glmtune.settings import check_strengths

OnProgress = Callable[[str, int, int], object]
"""Told which of the ``STAGES`` it is at, how many steps of it are done, and of how many."""


@dataclass(frozen=True, slots=True)
class ExportJob:
    """What to export.

    Attributes:
        source: preset name, hub id or folder of the base.
        format: one of ``WRITERS``.
        output_dir: folder to appear.
        family: release line, None to detect it.
        prefix_path: a tuned prefix, as for `find_prefix`.
        adapter_path: a LoRA adapter, as for `find_adapter`; merged into the weights, or written alone.
        dtype: floating type of the weights; None keeps the stored one.
        max_shard_bytes: largest weight file.
        overwrite: replace an earlier export in ``output_dir``.
        keep_chat_template: see `load_tokenizer_folder`; with ``official`` only.
        prefix_strength: how much the prefix counts in the export; another than 1 with ``tuned`` only.
        adapter_scale: what the LoRA is multiplied by before it is written.
        gguf_type: with ``gguf``: type of the file, a key of ``FILE_TYPES``.
    """

    source: str
    format: str
    output_dir: Path
    family: str | None
    prefix_path: str | None
    adapter_path: str | None
    dtype: torch.dtype | None
    max_shard_bytes: int
    overwrite: bool
    keep_chat_template: bool = False
    prefix_strength: float = 1.0
    adapter_scale: float = 1.0
    gguf_type: str = DEFAULT_TYPE


class Source:
    """The base as the user has it: weights read on demand, and a model of placeholders to run on them.

    Attributes:
        base: native name → weight of the base, codes turned into the weights they stand for.
        weights: the same with the adapter merged; what is written.
        model: the base alone, or with the prefix in it.
        runnable: what the export has to agree with: ``model``, or PEFT's wrapper around it. The adapter is
            not merged there, so that the comparison would notice a wrong merge.
    """

    def __init__(self, job: ExportJob, shards: OpenShards, on_progress: OnProgress) -> None:
        self.on_progress = on_progress
        self.folder = resolve_source(job.source)
        self.config: Any = load_config(job.source, self.folder, job.family)
        self.family = family_of_config(self.config)
        check_format(job, self.family)
        self.stored_dtype = stored_dtype(self.folder)
        self.dtype = job.dtype or self.stored_dtype
        self.base = native_tensors(self.folder, self.config, shards)
        # Prefixes and adapters name the base they were trained on by this, so it is that of the files as they
        # are: its configuration is copied before `without_layout` turns ours into that of the weights.
        self.fingerprint = partial(weights_fingerprint, copy.copy(self.config), self.base)
        self.layout = QuantizedLayout.of(self.config)
        self.is_quantized = self.layout is not None
        if self.is_quantized:  # exported as the floating point weights that the codes stand for
            self.base = dequantized_tensors(self.base, self.config)
            without_layout(self.config)
        _check_layout(job, self.family, self.config)
        self.model = self._base_ofplaceholders(job.source)
        self.weights, self.runnable, self.prefix = self.base, self.model, None
        if job.adapter_path is not None:
            self.adapter = find_adapter(job.adapter_path)
            self.runnable = load_adapter(self.adapter, self.model, scale=job.adapter_scale)
            self.weights = merge_adapter(self.base, self.runnable)
            if is_adapted(self.runnable, "lm_head"):
                self.config.tie_word_embeddings = False  # merged, it is no longer the embedding's matrix
        if job.prefix_path is not None:
            self.prefix_file = find_prefix(job.prefix_path)
            self.prefix = load_prefix(self.prefix_file, self.model)
            if job.format != "tuned":
                check_official(self.prefix, str(self.prefix_file))  # which all other formats write
            self.prefix.strength *= job.prefix_strength  # of the prefix itself from here on: it is written so
            attach_prefix(self.model, self.prefix)
        self.gguf: Written | None = None
        # After both: what they brought is real, and only placeholders are streamed.
        stream_weights(self.runnable, self.base)

    def _base_ofplaceholders(self, name: str) -> PreTrainedModel:
        # A copy, as transformers writes into the configuration of a model (attention, dtype).
        model: Any = placeholders(lambda: build_model(copy.deepcopy(self.config)))
        model.source = name
        # Taken from the files: the model's own method would look at placeholders.
        model.fingerprint, model.stored_layout = self.fingerprint, self.layout
        return model


def placeholders(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Build a model without memory, whose weights will be streamed; nothing of it is trained."""
    return build_of_placeholders(build).requires_grad_(False)  # pyright: ignore[reportReturnType]


def check_format(job: ExportJob, family: Family) -> None:
    """Refuse what a format cannot hold.

    Args:
        job: what to export.
        family: release line of the source.

    Raises:
        ConfigError: the format lacks what it writes, or has no place for what was given.
    """
    if job.prefix_path is not None and job.adapter_path is not None:
        raise ConfigError(
            "`prefix_path` and `adapter_path` are both set, but a model is tuned one way. Leave one out."
        )
    if job.format == "gguf":
        check_gguf(family, job.prefix_path)
    if job.format in ("transformers", "peft") and family is Family.CHATGLM:
        raise ConfigError(
            f"`format` is `{job.format}`, but transformers has no class for ChatGLM-6B (two-dimensional "
            f"positions, prefix mask). Use `format={'tuned' if job.format == 'peft' else 'official'}`."
        )
    if job.format == "peft" and job.adapter_path is None:
        raise ConfigError("`format` is `peft`, but no LoRA adapter is given. Add `adapter_path=RUN`.")
    if job.format == "transformers" and job.prefix_path is not None:
        official = (
            "" if family is Family.TRANSFORMERS else "`format=official` (base and prefix side by side), "
        )
        raise ConfigError(
            "`format` is `transformers`, but transformers' GLM has no place for a prefix. Use "
            f"{official}`format=prefix` or `format=tuned`; or tune with LoRA, which can be merged."
        )
    if job.format == "prefix" and job.prefix_path is None:
        raise ConfigError("`format` is `prefix`, but no prefix is given. Add `prefix_path=RUN`.")
    if job.format == "tuned" and job.prefix_path is None and job.adapter_path is None:
        raise ConfigError(
            "`format` is `tuned`, but nothing tuned is given. Add `prefix_path=RUN` or `adapter_path=RUN`."
        )
    _check_strengths(job)


def _check_layout(job: ExportJob, family: Family, config: Any) -> None:
    """Raise ConfigError where the official layout cannot hold a folder in transformers' format."""
    if job.format != "official" or not is_transformers_format(config):
        return
    if problems := unofficial(config):
        raise ConfigError(
            f"`format` is `official`, but `{job.source}` has {' and '.join(problems)}, and the official "
            "layout has no place for that. Use `format=transformers`, which vLLM and others read, too."
        )
    if family is Family.TRANSFORMERS:
        raise ConfigError(
            f"`format` is `official`, but nothing says of which release `{job.source}` is, whose layout, "
            "tokenizer and prompts it is to have. Name it, such as `model.family=glm4` for GLM-4 (-hf); or "
            "use `format=transformers`."
        )


def _check_strengths(job: ExportJob) -> None:
    """Raise ConfigError for a strength or scale that nothing written could have."""
    check_strengths(
        prefix=job.prefix_path,
        prefix_strength=job.prefix_strength,
        adapter=job.adapter_path,
        adapter_scale=job.adapter_scale,
    )
    for name in ("prefix_strength", "adapter_scale"):
        if getattr(job, name) == 0:
            raise ConfigError(
                f"`{name}` is 0, which is the base, so nothing of what was tuned would be exported. Give a"
                " number above 0, or export the base alone."
            )
    if job.prefix_strength != 1 and job.format != "tuned":
        raise ConfigError(
            f"`prefix_strength` is {job.prefix_strength:g}, but `format={job.format}` writes the official"
            " pytorch_model.bin, which has no place for one (log strength is added to scores, which no keys"
            " and values do). Use `format=tuned`: glmtune's own file of the prefix, which glmtune obeys; or"
            " leave it out."
        )
