"""Make a new prefix for a base model, starting at random, at zero or at a written instruction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glmtune.errors import ConfigError
from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.checkpoints.names import FusedLayout, split_fused
from glmtune.prefix.attach import without_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from glmtune.prefix.settings import PrefixSettings


def build_prefix_encoder(
    model: PreTrainedModel, settings: PrefixSettings, tokenizer: PreTrainedTokenizerBase | None = None
) -> PrefixEncoder:
    """Make a prefix encoder that fits a model; attaching it is a separate step.

    ``random``: PyTorch's defaults from its global generator, as in the official code (embedding: N(0, 1)).

    ``zero``: all prefix keys and values are zero. This is not "no prefix": a zero key scores 0 against every
    query, so the P positions take their share of the attention and add nothing to the output. With projection
    the last linear layer is zero and the rest random, so the first step moves only that layer.

    ``text``: the un-rotated keys and values that the base computes for the instruction, with the tokenizer's
    special tokens where it puts them. An instruction of more tokens than ``pre_seq_len`` loses its end; a
    shorter one is repeated from its start (its keys and values are copied) until the prefix is full.

    Args:
        model: the base; evaluated once for ``text``, otherwise only its config is read.
        settings: length, projection, initialisation, dropout.
        tokenizer: needed for ``text``.

    Returns:
        The encoder, on the CPU.

    Raises:
        ConfigError: ``text`` was asked for without a tokenizer.
    """
    shape = prefix_shape(model.config)
    hidden_size: int | None = model.config.hidden_size if settings.prefix_projection else None
    encoder = PrefixEncoder(
        shape,
        pre_seq_len=settings.pre_seq_len,
        hidden_size=hidden_size,
        embedding_width=hidden_size if isinstance(model.config, ChatGlmConfig) else None,
        dropout=settings.dropout,
    )
    if settings.init == "zero":
        last = encoder.trans[2] if settings.prefix_projection else encoder.embedding
        for weight in last.parameters():
            nn.init.zeros_(weight)
    if settings.init == "text":
        if tokenizer is None:
            raise ConfigError(
                "`prefix.init` is `text`, which needs the base's tokenizer, but none was given. "
                "Pass `tokenizer=load_tokenizer(...)`, or use `prefix.init=random`."
            )
        ids = tokenizer(settings.init_text, return_tensors="pt")["input_ids"]
        rows = text_rows(model, torch.as_tensor(ids))[: settings.pre_seq_len]
        repeats = torch.arange(settings.pre_seq_len) % rows.shape[0]
        with torch.no_grad():
            encoder.embedding.weight.copy_(rows[repeats])
    return encoder


@torch.no_grad()
def text_rows(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Compute what a text puts into attention, in the layout of a prefix embedding.

    The outputs of the key and value projections are recorded, before rotation: prefix keys are never rotated.

    Args:
        model: the base; an attached prefix is left out of this one forward.
        input_ids: int64 ``[1, T]``.

    Returns:
        float32 ``[T, L*2*K*H]`` on the CPU.
    """
    is_fused = isinstance(model.config, ChatGlmConfig)
    names = ("attention.query_key_value",) if is_fused else ("self_attn.k_proj", "self_attn.v_proj")
    recorded: list[Tensor] = []  # layer by layer, in the order of the names: that of the forward pass

    def record(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        recorded.append(output[0].float().cpu())

    # Recorded by hooks on the projections: their outputs are what a prefix replaces, before rotation and
    # cache, and the layers need not be run by hand.
    base: Any = model.base_model
    hooks = []
    was_training = model.training
    model.eval()
    try:
        for layer in base.layers:
            hooks += [layer.get_submodule(name).register_forward_hook(record) for name in names]
        with without_prefix(model):
            base(input_ids=input_ids.to(base.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    if isinstance(model.config, ChatGlmConfig):
        layout = FusedLayout.of(model.config)
        recorded = [part.T for fused in recorded for part in split_fused(fused.T, layout)[1:]]
    return torch.cat(recorded, dim=-1)
