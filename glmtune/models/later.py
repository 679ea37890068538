"""The classes of models on transformers' GLM, with what glmtune adds: ChatGLM2 and everything after it.

::

    ChatGLM2, CodeGeeX2, ChatGLM3, GLM-4, GLM-Edge   OfficialGlmForCausalLM  = LaterModel + `GlmForCausalLM`
    GLM-4-0414, GLM-Z1-0414                          OfficialGlm4ForCausalLM = LaterModel + `Glm4ForCausalLM`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from glmtune.models.architectures.chunked_loss import chunked_cross_entropy
from glmtune.models.architectures.grouped_attention import register_grouped_attention
from glmtune.models.checkpoints.names import state_to_native
from glmtune.models.checkpoints.transformers_format import official_form
from glmtune.models.official import OfficialModel

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class LaterModel(OfficialModel):
    """What models on transformers' `GlmForCausalLM` and `Glm4ForCausalLM` have in common.

    Four things differ from those classes, none of them in the arithmetic: the padding token's embedding is
    trained like any other (as in the releases), the rotary frequencies stay float32 whatever the model is
    cast to, saving writes the names of the checkpoint's format, and logits without a label can be left out.
    """

    model: Any
    lm_head: Any

    def __init__(self, config: GlmConfig | Glm4Config) -> None:
        """Build the model with fresh weights.

        Args:
            config: as made by `glmtune.models.checkpoints.config.native_config`.
        """
        parent: Any = super()
        parent.__init__(config)
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
            rotary = type(self.model.rotary_emb)(config=self.config)
        self.model.rotary_emb = rotary.to(device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
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
        base_hidden: Tensor | None = None,
        hidden_only: bool = False,
        each_label: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model; the parent's arguments, and some more.

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
            base_hidden: with ``labelled_only``, see ``base_TD`` of `chunked_cross_entropy`.
            hidden_only: with ``labelled_only``, see `chunked_cross_entropy`.
            each_label: likewise.
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
            parent: Any = super()
            return parent.forward(**inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        num_items = kwargs.pop("num_items_in_batch", None)
        hidden_BSD = self.model(**inputs, **kwargs).last_hidden_state
        return chunked_cross_entropy(
            hidden_BSD,
            labels,
            self.lm_head,
            vocab_size=self.config.vocab_size,
            num_items=num_items,
            base_TD=base_hidden,
            hidden_only=hidden_only,
            each_label=each_label,
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state dictionary in native or official names (a trainer resumes from what it saved).

        A tied head may be missing: files in transformers' format hold it once, as the embedding.
        """
        if any(name.startswith("transformer.") for name in state_dict):
            state_dict = state_to_native(state_dict, official_form(self.config))
        if self.config.tie_word_embeddings and EMBEDDING in state_dict and HEAD not in state_dict:
            state_dict = {**state_dict, HEAD: state_dict[EMBEDDING]}
        parent: Any = super()
        return parent.load_state_dict(state_dict, strict, assign)


class OfficialGlmForCausalLM(LaterModel, GlmForCausalLM):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    """ChatGLM2, CodeGeeX2, ChatGLM3, GLM-4 and GLM-Edge."""


class OfficialGlm4ForCausalLM(LaterModel, Glm4ForCausalLM):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    """GLM-4-0414 and GLM-Z1-0414, whose blocks have two norms more."""
