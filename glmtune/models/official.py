"""The classes of loaded models: an architecture of either generation, with what glmtune adds to both.

::

    ChatGLM-6B     OfficialChatGlmForCausalLM = OfficialModel + our `ChatGlmForCausalLM`
    later releases OfficialGlmForCausalLM     = OfficialModel + transformers' `GlmForCausalLM`

The architectures know tensors alone. Checkpoints, fingerprints and `chat` are added here, above all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GlmConfig, GlmForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.utils.deprecation import deprecate_kwarg

from glmtune.models.architectures.chatglm import ChatGlmForCausalLM
from glmtune.models.architectures.chunked_loss import chunked_cross_entropy
from glmtune.models.architectures.grouped_attention import register_grouped_attention
from glmtune.models.architectures.kv_cache import let_grow
from glmtune.models.chat.chat import ChatMixin
from glmtune.models.checkpoints.fingerprint import fingerprinted_names, sampled_signs, signs_fingerprint
from glmtune.models.checkpoints.names import state_to_native
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.models.checkpoints.writing import DEFAULT_SHARD_BYTES, save_official
from glmtune.models.releases.families import Family, family_of_config


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
        """The release line, stored in the configuration.

        Raises:
            CheckpointError: see `family_of_config`.
        """
        return family_of_config(self.config)

    def save_pretrained(  # the parent's own arguments that mean something here
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int = DEFAULT_SHARD_BYTES,
        **_: object,
    ) -> None:
        """Write an official checkpoint and generation_config.json, which `load_official` reads back.

        Replaces `PreTrainedModel.save_pretrained`, which would write native names. transformers' Trainer
        calls it for every checkpoint.

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
        """Let the cache that `generate` makes for itself grow in place.

        `GenerationMixin.generate` (transformers 5) calls this once, before the first token. A cache that the
        caller gave is left as it is.
        """
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
        """Identify the base model: architecture and weights; see `weights_fingerprint`.

        Prefixes or adapters attached to the model do not change it.

        Returns:
            64 hexadecimal digits.
        """
        named = self.named_parameters(remove_duplicate=False)  # a tied head has two names
        parameters = {_without_adapters(name): tensor for name, tensor in named}
        codes = {  # layers of codes may hold them and their scales in another order than their parameters
            f"{_without_adapters(name)}.{part}": partial(module.stored_tensor, part)
            for name, module in self.named_modules()
            if hasattr(module, "stored_tensor")
            for part in module._parameters
        }
        signs = {
            name: sampled_signs(codes[name]() if name in codes else parameters[name])
            for name in fingerprinted_names(self.config)
        }
        return signs_fingerprint(self.config, signs)


def _without_adapters(name: str) -> str:
    return name.replace(".base_layer", "")  # the module into which PEFT moves a layer that it wraps


class OfficialChatGlmForCausalLM(OfficialModel, ChatGlmForCausalLM):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    """ChatGLM-6B that reads and writes official checkpoints, knows its release line and chats."""


class OfficialGlmForCausalLM(OfficialModel, GlmForCausalLM):  # pyright: ignore[reportIncompatibleMethodOverride]
    """`GlmForCausalLM` that reads and writes official checkpoints and knows its release line.

    Four things differ from the parent, none of them in the arithmetic: the padding token's embedding is
    trained like any other (as in the releases), the rotary frequencies stay float32 whatever the model is
    cast to, saving writes official names, and logits without a label can be left out.
    """

    def __init__(self, config: GlmConfig) -> None:
        """Build the model with fresh weights.

        Args:
            config: as made by `glmtune.models.checkpoints.config.native_config`.
        """
        super().__init__(config)
        register_grouped_attention()
        # transformers gives the embedding a padding index, whose row then gets no gradient. The released code
        # has none, and in ChatGLM2 the padding id is also <unk>.
        self.model.embed_tokens.padding_idx = None
        self.generation_config = GenerationConfig(
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            do_sample=False,
        )

    def rebuild_rotary(self) -> None:
        """Form the rotary frequencies anew in float32 (checkpoints hold rounded ones, casts round them)."""
        device = self.model.embed_tokens.weight.device
        with torch.device("cpu"):
            rotary = GlmRotaryEmbedding(config=self.config)
        self.model.rotary_emb = rotary.to(device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> OfficialGlmForCausalLM:
        """Cast or move as asked, but never the rotary frequencies out of float32.

        PyTorch's private hook of ``half()``, ``to()``, ``cuda()`` and all their like. bfloat16 rounds a
        frequency by up to 0.2 %: a thousand tokens on, its angle can be wrong by more than a radian.
        """
        super()._apply(fn, recurse)
        if self.model.rotary_emb.inv_freq.dtype != torch.float32:
            self.rebuild_rotary()
        return self

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
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
            cache: cache to read and extend.
            inputs_embeds: ``[B, S, hidden]`` instead of ``input_ids``.
            labels: int64 ``[B, S]``, −100 = no loss; shifted by one inside.
            use_cache: keep keys and values.
            logits_to_keep: see the parent.
            labelled_only: with labels: form logits only where a label asks for one, some at a time, and
                return none. The head and its ``vocab_size`` numbers per token are then spared on prompts
                and padding.
            **kwargs: passed down; ``num_items_in_batch`` divides the summed loss instead of its own count.

        Returns:
            The parent's output; with ``labelled_only`` see `LabelledOutput`.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        if labels is None or not labelled_only:
            return super().forward(**inputs, **{"labels": labels, "logits_to_keep": logits_to_keep}, **kwargs)
        num_items = kwargs.pop("num_items_in_batch", None)
        hidden_BSD = self.model(**inputs, **kwargs).last_hidden_state
        return chunked_cross_entropy(
            hidden_BSD,
            labels,
            self.lm_head,
            vocab_size=self.config.vocab_size,
            num_items=num_items,
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state dictionary in native or official names (a trainer resumes from what it saved)."""
        if any(name.startswith("transformer.") for name in state_dict):
            state_dict = state_to_native(state_dict, self.config)
        return super().load_state_dict(state_dict, strict, assign)
