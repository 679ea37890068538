"""ChatGLM-6B, the first generation, as a transformers model; parameter names are the official ones.

It is a prefix LM: a row is context, gMASK (or MASK), sop, answer. The answer fills the gap that the mask
token marks, and to fill a gap one reads both sides of it: tokens of the context see each other in both
directions, those from sop on see what is before them::

      ids                  c0 c1 c2 gMASK sop a0 a1
      first positions       0  1  2   3    3   3  3     place in the context; the answer's is that of its gap
      second positions      0  0  0   0    1   2  3     place in the answer
      c0 ... gMASK see      x  x  x   x
      sop sees              x  x  x   x    x
      a0 sees               x  x  x   x    x   x

Each of the two positions of a token turns one half of every head.

Shapes: B rows, S tokens, D hidden width, N heads, H channels of a head, T position streams.

Source:
    Du et al. 2022, arXiv:2103.10360 (prefix LM, two position streams); Wang et al. 2022, arXiv:2203.00555
    (scaled residual); file ``modeling_chatglm.py`` of THUDM/chatglm-6b.
"""

# ruff: noqa: RUF012 (class attributes in the form in which transformers declares them)
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.glm.modeling_glm import eager_attention_forward
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from glmtune.errors import ConfigError, DataError
from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.architectures.chatglm_inputs import (
    additive_mask,
    answer_mask,
    context_blocks,
    continue_positions,
    padding_mask,
    position_streams,
    shared_context,
    token_positions,
)
from glmtune.models.architectures.chatglm_rotary import ChatGlmRotaryEmbedding, rotate
from glmtune.models.architectures.chunked_loss import chunked_cross_entropy

RESIDUAL_SCALE = math.sqrt(2 * 28)
"""Weight of the residual branch (DeepNorm's alpha, for 28 layers). The released block is never told how many
layers there are and takes its default, so a model of another depth has the same constant."""


class ChatGlmAttention(nn.Module):
    """Multi-head attention with one projection whose rows are ordered [head][query, key, value][channel]."""

    num_key_value_groups = 1
    is_causal = True

    def __init__(self, config: ChatGlmConfig, layer_idx: int) -> None:
        """Build the projections; ``layer_idx`` is the place in the cache."""
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        # The release divides queries by (layer + 1) as well and multiplies the scores by it before the
        # softmax, to keep float16 scores in range. That cancels out, and fused attention holds scores in
        # float32.
        self.scaling = config.head_dim**-0.5
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_BSD: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        context_length: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens.

        With ``context_length`` c the context and the answer are two calls, so that no mask ``[S, S]`` is ever
        made and a prompt, whose answer is sop alone, runs on the kernels without a mask: the first c tokens
        see each other, the others see what ``attention_mask`` ``[1, 1, S - c, S]`` (None = all) shows them.

        Returns:
            ``[B, S, D]`` and, from eager attention, weights ``[B, N, S, keys]``.
        """
        fused = self.query_key_value(hidden_BSD).unflatten(-1, (self.config.num_attention_heads, 3, -1))
        query, key, value = fused.unbind(-2)
        query, key = (rotate(heads, *position_embeddings) for heads in (query, key))
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            str(self.config._attn_implementation), eager_attention_forward
        )
        kwargs |= {"dropout": 0.0, "scaling": self.scaling}
        if context_length is None:
            mixed, weights = attend(self, query, key, value, attention_mask, **kwargs)
            return self.dense(mixed.flatten(2)), weights
        kwargs["is_causal"] = False
        key, value = (heads[:, :, : query.shape[2]] for heads in (key, value))  # a static cache has more room
        context, answer = query.split((context_length, query.shape[2] - context_length), dim=2)
        seen = (heads[:, :, :context_length] for heads in (key, value))
        mixed_context, _ = attend(self, context, *seen, None, **kwargs)
        mixed_answer, _ = attend(self, answer, key, value, attention_mask, **kwargs)
        return self.dense(torch.cat((mixed_context, mixed_answer), dim=1).flatten(2)), None


class ChatGlmMLP(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, config: ChatGlmConfig) -> None:
        """Build the layers."""
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Transform every token alone.

        Args:
            hidden_BSD: float.

        Returns:
            ``[B, S, D]``.
        """
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(hidden_BSD), approximate="tanh"))


class ChatGlmLayer(GradientCheckpointingLayer):
    """Attention and MLP; each adds to its own normalised input, scaled, not to the stream that came in."""

    def __init__(self, config: ChatGlmConfig, layer_idx: int) -> None:
        """Build the block at a place in the stack."""
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ChatGlmAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ChatGlmMLP(config)

    def forward(self, hidden_BSD: Tensor, **kwargs: Any) -> Tensor:
        """Run the block.

        Args:
            hidden_BSD: the residual stream.
            **kwargs: those of `ChatGlmAttention.forward`.

        Returns:
            The stream after the block, ``[B, S, D]``.
        """
        normed_BSD = self.input_layernorm(hidden_BSD)
        mixed_BSD, _ = self.attention(normed_BSD, **kwargs)
        normed_BSD = self.post_attention_layernorm(RESIDUAL_SCALE * normed_BSD + mixed_BSD)
        return RESIDUAL_SCALE * normed_BSD + self.mlp(normed_BSD)


class ChatGlmPreTrainedModel(PreTrainedModel):
    """What the stack and the causal LM tell transformers about themselves."""

    config: ChatGlmConfig
    config_class = ChatGlmConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGlmLayer"]
    # Official files hold a rotary table per layer; it is formed anew here.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": ChatGlmLayer,
        "attentions": ChatGlmAttention,
    }

    @property
    def dtype(self) -> torch.dtype:
        """Type of the hidden state: that of the first norm, as quantized embeddings have none."""
        return next(weight.dtype for name, weight in self.named_parameters() if "layernorm" in name)

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """Refuse kernels without an arbitrary mask.

        Raises:
            ConfigError: the implementation cannot express the prefix-LM mask.
        """
        if requested_attention is not None and (
            "flash" in requested_attention or "flex" in requested_attention
        ):
            raise ConfigError(
                f"The attention implementation is `{requested_attention}`, but it cannot run ChatGLM-6B, "
                "whose context is seen in both directions and its answer causally: only `sdpa` and `eager` "
                "take such a mask here. Use `attn_implementation='sdpa'`: PyTorch's flash kernel then runs "
                "wherever a prompt needs no mask."
            )
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


class ChatGlmModel(ChatGlmPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ChatGlmConfig) -> None:
        """Build the stack with fresh weights."""
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGlmLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary_emb = ChatGlmRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the stack.

        Args:
            input_ids: int64 ``[B, S]``.
            attention_mask: ``[B, cached + S]``, nonzero = real; or ``[B, 1, S, cached + S]``, boolean with
                the official meaning (True = blocked) or additive. None: nothing is padding.
            position_ids: int64 ``[B, T, S]``; None derives them, which needs whole rows.
            cache: cache to read and extend; it must hold the whole context.
            inputs_embeds: ``[B, S, D]`` instead of ``input_ids``; the mask (four-dimensional, unless there
                is a cache) and the positions must be given then.
            use_cache: keep keys and values.
            **kwargs: passed to the attention.

        Returns:
            Last hidden state ``[B, S, D]`` after the final norm, the cache, and what was to be captured.

        Raises:
            ConfigError: both or neither of ``input_ids`` and ``inputs_embeds`` are given.
            DataError: a row has no sop or no mask token, or positions are missing where none can be derived.
            ShapeError: mask or positions have another form than those above.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "none of them" if input_ids is None else "both"
            raise ConfigError(
                f"Exactly one of input_ids and inputs_embeds must be given, but {given} was. Pass input_ids, "
                "or inputs_embeds with attention_mask and position_ids."
            )
        hidden_BSD = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        is_start = cache is None or cache.get_seq_length() == 0
        if position_ids is None:
            if input_ids is None or not is_start:
                raise DataError(
                    "position_ids are missing, but only whole rows of input_ids tell them: pass them with a "
                    "cache or with inputs_embeds, as `prepare_inputs_for_generation` does."
                )
            position_ids = token_positions(input_ids, self.config, padding_mask(attention_mask))
        else:
            position_ids = position_streams(position_ids, self.config)
        mask, context_length = self._visible(input_ids, attention_mask, hidden_BSD, cache)
        position_embeddings = self.rotary_emb(hidden_BSD, position_ids)
        for layer in self.layers:
            hidden_BSD = layer(
                hidden_BSD,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                context_length=context_length,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(hidden_BSD), cache=cache)

    def _visible(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, hidden_BSD: Tensor, cache: Cache | None
    ) -> tuple[Tensor | None, int | None]:
        """Say what every query sees: a mask; or the mask of the answer alone, and the context's length."""
        if attention_mask is not None and attention_mask.dim() == 4:
            return additive_mask(attention_mask, hidden_BSD), None
        is_start = cache is None or cache.get_seq_length() == 0
        if is_start and input_ids is not None and "sdpa" in str(self.config._attn_implementation):
            # The common case: one prompt, or rows of one length. No mask over S x S is formed then, and
            # PyTorch's flash kernel, which takes none, can run; padded batches take the general way below.
            context_length = shared_context(input_ids, attention_mask, self.config)
            if context_length is not None:
                return answer_mask(context_length, hidden_BSD), context_length
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_BSD,
            attention_mask=attention_mask,
            cache=cache,
            block_sequence_ids=context_blocks(input_ids, self.config) if is_start else None,
        )
        return mask, None  # pyright: ignore[reportReturnType]


class ChatGlmForCausalLM(ChatGlmPreTrainedModel, GenerationMixin):  # pyright: ignore[reportIncompatibleMethodOverride]
    """ChatGLM-6B with its head; `OfficialChatGlmForCausalLM` adds checkpoints, fingerprint and chat."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGlmConfig) -> None:
        """Build the model with fresh weights."""
        super().__init__(config)
        self.transformer = ChatGlmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            do_sample=False,
        )

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @can_return_tuple
    def forward(
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
        """Run the model; inputs as in `ChatGlmModel.forward`.

        Args:
            input_ids: int64 ``[B, S]``.
            attention_mask: two- or four-dimensional.
            position_ids: int64 ``[B, T, S]``.
            cache: cache to read and extend.
            inputs_embeds: ``[B, S, D]`` instead of ``input_ids``.
            labels: int64 ``[B, S]``, −100 = no loss; shifted by one inside.
            use_cache: keep keys and values.
            logits_to_keep: form the logits of this many last tokens, or of these; 0 = all.
            labelled_only: with labels: form logits only where a label asks for one, some at a time, and
                return none.
            base_hidden: with ``labelled_only``, see ``base_TD`` of `chunked_cross_entropy`.
            hidden_only: with ``labelled_only``, see `chunked_cross_entropy`.
            each_label: likewise.
            **kwargs: passed down; ``num_items_in_batch`` divides the summed loss instead of its own count.

        Returns:
            Loss (mean over the labels), logits ``[B, S, vocab]`` and the cache; with ``labelled_only`` see
            `LabelledOutput`.
        """
        is_sparing = labels is not None and labelled_only
        num_items = kwargs.pop("num_items_in_batch", None) if is_sparing else None
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=False if is_sparing else use_cache,
            **kwargs,
        )
        hidden_BSD = outputs.last_hidden_state
        assert hidden_BSD is not None
        if labels is not None and is_sparing:
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
        logits = self.lm_head(slice_logits_to_keep(hidden_BSD, logits_to_keep))
        loss: Tensor | None = None
        if labels is not None:
            loss_function: Any = self.loss_function  # transformers types it by its result only
            loss = loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as every transformers model does; the tokenizer's four-dimensional mask is accepted too.

        Args:
            *args: see `GenerationMixin.generate`.
            attention_mask: ``[B, S]``, nonzero = real, or ``[B, 1, S, S]``, boolean, True = blocked.
            **kwargs: see `GenerationMixin.generate`; ``position_ids`` ``[B, T, S]`` are continued.
        """
        mask = padding_mask(attention_mask)
        parent: Any = super()
        return parent.generate(*args, **kwargs, **({} if mask is None else {"attention_mask": mask}))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Add the positions of the whole text so far; the parent cuts them to the tokens of this step."""
        if position_ids is not None:
            position_ids = continue_positions(position_ids, input_ids, self.config)
        elif input_ids.shape[1] > 0:
            position_ids = token_positions(input_ids, self.config, attention_mask)
        parent: Any = super()
        return parent.prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    # The four methods below are hooks of transformers 5's `generate`. Its own versions count positions in one
    # stream and form a causal mask; here both depend on the context, so they are made anew from all ids.

    def create_masks_for_generate(self, attention_mask: Tensor | None, **_: object) -> Tensor | None:
        """Leave the mask to the forward pass, which knows the context, also with a static cache."""
        return attention_mask

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> None:
        """Leave positions to `prepare_inputs_for_generation`."""

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Called after every token. The parent would append "last position + 1" to positions that the user
        # gave; they are put back as given, and `prepare_inputs_for_generation` continues them by our rule.
        model_kwargs: dict[str, Any] = args[1] if len(args) > 1 else kwargs["model_kwargs"]
        given = model_kwargs.pop("position_ids", None)
        return super()._update_model_kwargs_for_generation(*args, **kwargs) | {"position_ids": given}

    def _expand_inputs_for_generation(
        self, *args: Any, position_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        # Called once, for beams and for several answers per prompt: positions are repeated like the rows.
        parent: Any = super()
        input_ids, rest = parent._expand_inputs_for_generation(*args, **kwargs)
        if position_ids is not None:
            rest["position_ids"] = position_ids.repeat_interleave(len(input_ids) // len(position_ids), dim=0)
        return input_ids, rest
