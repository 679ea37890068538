"""The model of the second generation and later: transformers' GLM, kept in the official layout on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GlmConfig, GlmForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.utils.deprecation import deprecate_kwarg

from glmtune.models.architectures.chunked_loss import chunked_cross_entropy
from glmtune.models.architectures.grouped_attention import register_grouped_attention
from glmtune.models.checkpoints.names import state_to_native
from glmtune.models.official import OfficialModel


class OfficialGlmForCausalLM(OfficialModel, GlmForCausalLM):  # pyright: ignore[reportIncompatibleMethodOverride]
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
            config: as made by `glmtune.models.checkpoints.config.native_config`.
        """
        super().__init__(config)
        register_grouped_attention()
        self.source = ""
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
