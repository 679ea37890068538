"""The model of the second generation and later: transformers' GLM, kept in the official layout on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GlmConfig, GlmForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

from glmtune.labels import IGNORE_INDEX
from glmtune.models.checkpoint import DEFAULT_SHARD_BYTES, save_official
from glmtune.models.config import SIZES, rope_ratio
from glmtune.models.families import Family
from glmtune.models.names import name_table, state_to_native

SAMPLES_PER_TENSOR = 4096


class OfficialGlmForCausalLM(GlmForCausalLM):
    """`GlmForCausalLM` that reads and writes official checkpoints and knows its release line.

    Four things differ from the parent, none of them in the arithmetic: the padding token's embedding is
    trained like any other (as in the releases), the rotary frequencies stay float32 whatever the model is
    cast to, saving writes official names, and logits without a label can be left out.

    Attributes:
        source: what the user named; the folder's path or "" for a model made from a configuration.
    """

    def __init__(self, config: GlmConfig) -> None:
        """Build the model with fresh weights.

        Args:
            config: as made by `glmtune.models.config.native_config`.
        """
        super().__init__(config)
        self.source = ""
        self.model.embed_tokens.padding_idx = None
        self.generation_config = GenerationConfig(
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            do_sample=False,
        )

    @property
    def family(self) -> Family:
        """The release line, stored in the configuration."""
        return Family(getattr(self.config, "glmtune_family", Family.GLM4))

    def rebuild_rotary(self) -> None:
        """Form the rotary frequencies anew in float32 (checkpoints hold rounded ones, casts round them)."""
        device = self.model.embed_tokens.weight.device
        with torch.device("cpu"):
            rotary = GlmRotaryEmbedding(config=self.config)
        self.model.rotary_emb = rotary.to(device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> OfficialGlmForCausalLM:
        super()._apply(fn, recurse)
        if self.model.rotary_emb.inv_freq.dtype != torch.float32:
            self.rebuild_rotary()
        return self

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        labelled_only: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model; the parent's arguments, and one more.

        Args:
            input_ids: int64 ``[B, S]``.
            attention_mask: ``[B, S]``, 1 = real; see the parent for other forms.
            position_ids: int64 ``[B, S]``; None counts from 0.
            past_key_values: cache to read and extend.
            inputs_embeds: ``[B, S, hidden]`` instead of ``input_ids``.
            labels: int64 ``[B, S]``, −100 = no loss; shifted by one inside.
            use_cache: keep keys and values.
            logits_to_keep: see the parent.
            labelled_only: with labels: form logits only where a label asks for one. The head and its
                ``vocab_size`` numbers per token are then spared on prompts and padding.
            **kwargs: passed down; ``num_items_in_batch`` divides the summed loss instead of its own count.

        Returns:
            The parent's output; with ``labelled_only`` the logits are float32 ``[T, vocab]``, one row per
            label, in reading order.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        if labels is None or not labelled_only:
            return super().forward(**inputs, **{"labels": labels, "logits_to_keep": logits_to_keep}, **kwargs)
        num_items = kwargs.pop("num_items_in_batch", None)
        hidden_BSD = self.model(**inputs, **kwargs).last_hidden_state
        asked_BS = labels[:, 1:] != IGNORE_INDEX
        targets_T = labels[:, 1:][asked_BS]
        logits_TV = self.lm_head(hidden_BSD[:, :-1][asked_BS]).float()
        loss = nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum")
        loss = loss / (targets_T.numel() if num_items is None else num_items)
        return CausalLMOutputWithPast(loss=loss, logits=logits_TV)  # pyright: ignore[reportArgumentType]

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
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
        save_official(self, Path(save_directory), max_shard_bytes=max_shard_size, state_dict=state_dict)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(save_directory)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state dictionary in native or official names (a trainer resumes from what it saved)."""
        if any(name.startswith("transformer.") for name in state_dict):
            state_dict = state_to_native(state_dict, self.config)
        return super().load_state_dict(state_dict, strict, assign)

    def fingerprint(self) -> str:
        """Identify the base model: architecture and weights.

        Only the signs of some 4,096 spread elements per tensor enter, because a sign survives every cast; so
        the same weights in float32, bfloat16 and float16 have one fingerprint, and prefixes or adapters
        attached to the model do not change it. Training the weights does.

        Returns:
            64 hexadecimal digits.
        """
        facts = {name: getattr(self.config, native) for name, native in sorted(SIZES.items())}
        facts |= {"kv_heads": self.config.num_key_value_heads, "qkv_bias": self.config.attention_bias}
        facts |= {"eps": self.config.rms_norm_eps, "rope_ratio": rope_ratio(self.config)}
        facts |= {"rope_type": (self.config.rope_parameters or {}).get("rope_type", "default")}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        parameters = {name.replace(".base_layer", ""): tensor for name, tensor in self.named_parameters()}
        for name in (name for entry in name_table(self.config) for name in entry.native):
            flat = parameters[name].detach().reshape(-1)  # ".base_layer": below an adapter of PEFT
            sample = flat[
                :: max(1, flat.numel() // SAMPLES_PER_TENSOR) | 1
            ]  # odd: no column is met again and again
            digest.update(name.encode() + torch.signbit(sample).cpu().numpy().tobytes())
        return digest.hexdigest()
