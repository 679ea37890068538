"""What the models of every generation share: official checkpoints out, and an identity."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from glmtune.models.architectures.kv_cache import let_grow
from glmtune.models.chat.chat import ChatMixin
from glmtune.models.checkpoints.config import identity_facts
from glmtune.models.checkpoints.names import name_table
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.models.checkpoints.reading import DEFAULT_SHARD_BYTES, save_official
from glmtune.models.releases.families import Family

SAMPLES_PER_TENSOR = 4096


class OfficialModel(ChatMixin):
    """Makes a causal LM of transformers write official checkpoints and know its release line and fingerprint.

    Attributes:
        source: what the user named; the folder's path or "" for a model made from a configuration.
        stored_layout: how the weights are or were codes, where the configuration does not tell: because the
            model holds the floating point weights behind them, or another library quantized it.
    """

    config: Any
    generation_config: GenerationConfig | None
    named_parameters: Any
    named_modules: Any
    source: str = ""
    stored_layout: QuantizedLayout | None = None

    @property
    def family(self) -> Family:
        """The release line, stored in the configuration."""
        return Family(getattr(self.config, "glmtune_family", Family.GLM4))

    def save_pretrained(  # the parent's own arguments that mean something here
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int = DEFAULT_SHARD_BYTES,
        **_: object,
    ) -> None:
        """Write an official checkpoint and generation_config.json, which `load_base` reads back.

        Args:
            save_directory: created if absent.
            is_main_process: other processes of a distributed run write nothing.
            state_dict: weights gathered by a trainer, native names; None takes the model's own.
            max_shard_size: bytes per weight file.
            **_: arguments of the parent without meaning here (safetensors are always written).
        """
        if not is_main_process:
            return
        save_official(
            cast(PreTrainedModel, self),
            Path(save_directory),
            max_shard_bytes=max_shard_size,
            state_dict=state_dict,
        )
        if self.generation_config is not None:
            self.generation_config.save_pretrained(save_directory)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Let the cache that `generate` makes for itself grow in place."""
        was_given = model_kwargs.get("cache") is not None
        parent: Any = super()
        parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if not was_given:
            let_grow(model_kwargs.get("cache"))

    @property
    def quantization(self) -> str | None:
        """Method by which the weights were quantized, None for floating point ones."""
        layout = self.stored_layout or QuantizedLayout.of(self.config)
        return None if layout is None else layout.method

    def is_base(self, fingerprint: str) -> bool:
        """Say whether something trained on a base fits this one.

        Args:
            fingerprint: of that base.

        Returns:
            True for this model's own fingerprint, and for that of the weights it was quantized from.
        """
        layout = self.stored_layout or QuantizedLayout.of(self.config)
        return fingerprint == self.fingerprint() or (
            layout is not None and fingerprint == layout.source_fingerprint
        )

    @property
    def parent_is_unknown(self) -> bool:
        """Whether the weights are codes and nothing tells of which weights, as in the released INT4 files."""
        layout = self.stored_layout or QuantizedLayout.of(self.config)
        return layout is not None and not layout.source_fingerprint

    def fingerprint(self) -> str:
        """Identify the base model: architecture and weights.

        Only the signs of some 4,096 spread elements per tensor enter, because a sign survives every cast; so
        the same weights in float32, bfloat16 and float16 have one fingerprint, and prefixes or adapters
        attached to the model do not change it. Training the weights does, and so does quantizing them.

        Returns:
            64 hexadecimal digits.
        """
        named = self.named_parameters(remove_duplicate=False)  # a tied head has two names
        parameters = {_below_adapters(name): tensor for name, tensor in named}
        codes = {  # layers of codes may hold them and their scales in another order than their parameters
            f"{_below_adapters(name)}.{part}": partial(module.stored_tensor, part)
            for name, module in self.named_modules()
            if hasattr(module, "stored_tensor")
            for part in module._parameters
        }
        wanted = _fingerprinted(self.config)
        signs = {name: sampled_signs(codes[name]() if name in codes else parameters[name]) for name in wanted}
        return signs_fingerprint(self.config, signs)


def _below_adapters(name: str) -> str:
    return name.replace(".base_layer", "")  # of PEFT


def weights_fingerprint(config: Any, weights: Mapping[str, Tensor]) -> str:
    """Return the fingerprint of `OfficialModel.fingerprint` for weights that need not be in a model.

    Args:
        config: as made by `native_config`.
        weights: native name → tensor, each looked at once.
    """
    names = _fingerprinted(config)
    return signs_fingerprint(config, {name: sampled_signs(weights[name]) for name in names})


def signs_fingerprint(config: Any, signs: Mapping[str, bytes]) -> str:
    """Return the same from what `sampled_signs` returned for each weight.

    Args:
        config: as made by `native_config`.
        signs: native name → one byte per sample.
    """
    digest = hashlib.sha256(json.dumps(identity_facts(config), sort_keys=True).encode())
    for name in _fingerprinted(config):
        digest.update(name.encode() + signs[name])
    return digest.hexdigest()


def sampled_signs(weight: Tensor) -> bytes:
    """Return one byte per sample of a weight: 1 where it is negative."""
    flat = weight.detach().reshape(-1)
    return torch.signbit(flat[:: sample_step(flat.numel())]).cpu().numpy().tobytes()


def sample_step(count: int) -> int:
    """Return the distance between samples: odd, so that no column is met again and again."""
    return max(1, count // SAMPLES_PER_TENSOR) | 1


def _fingerprinted(config: Any) -> list[str]:
    return [name for entry in name_table(config) if not entry.is_copy for name in entry.native]
