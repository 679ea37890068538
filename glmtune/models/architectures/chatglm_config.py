"""Configuration of ChatGLM-6B, the first generation."""

from __future__ import annotations

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

POSITION_RULES = ("final", "march_2023")
"""How the first position stream treats the sop token under gMASK; see `ChatGlmConfig.position_rule`."""


@strict
class ChatGlmConfig(PreTrainedConfig):
    """Sizes and special tokens of a ChatGLM-6B; the defaults are those of the final release.

    Attributes:
        vocab_size: rows of the embedding, 130,528, or 150,528 where image tokens stand in front.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP's inner layer.
        num_hidden_layers: blocks.
        num_attention_heads: heads; queries, keys and values have as many.
        max_position_embeddings: positions the model was trained for, tokens.
        layer_norm_eps: added to the variance in every norm.
        position_encoding_2d: two position streams, each turning half of a head; otherwise one stream.
        position_rule: ``final``: the first stream stands still from the sop token on. ``march_2023``: under
            gMASK it does so only after the sop token, which keeps its own index.
        initializer_range: standard deviation of fresh weights.
        use_cache: keep keys and values by default.
        tie_word_embeddings: always true: embedding and head are one matrix.
        bos_token_id: sop, the first token of the answer.
        eos_token_id: eop, the last token of the answer.
        mask_token_id: MASK, the gap inside a text.
        gmask_token_id: gMASK, the gap at the end of a text.
        pad_token_id: fills rows.
        glmtune_family: release line, see `glmtune.models.releases.families`.
    """

    model_type = "chatglm"
    attribute_map: ClassVar[dict[str, str]] = {
        "inner_hidden_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "max_sequence_length": "max_position_embeddings",
        "layernorm_epsilon": "layer_norm_eps",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    position_encoding_2d: bool = True
    position_rule: str = "final"
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    pad_token_id: int | None = 3
    glmtune_family: str = "chatglm"

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads: every query head has its own."""
        return self.num_attention_heads

    @property
    def fused_per_head(self) -> bool:
        """Whether the fused projection is laid out head by head: always, in this generation."""
        return True

    @property
    def num_position_streams(self) -> int:
        """Position numbers per token: 2, or 1 without two-dimensional positions."""
        return 2 if self.position_encoding_2d else 1
