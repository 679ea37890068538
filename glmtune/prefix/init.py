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

    With a gate the model is the base at first, wherever the prefix starts.

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
        num_gates=model.config.num_attention_heads if settings.gate else None,
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
def take_over(saved: PrefixEncoder, encoder: PrefixEncoder, settings: PrefixSettings, name: str) -> None:
    """Give a new prefix the values of a saved one, as far as its shape allows.

    ::

        saved       | 0 | 1 | 2 | 3 |
        as long     | 0 | 1 | 2 | 3 |
        shorter     | 0 | 1 |               the first positions
        longer      | 0 | 1 | 2 | 3 | a | b |     a, b: fresh ones, made by ``prefix.init``

    A projected prefix may become a plain one: the keys and values that it computes are tuned on. The other
    way there is no projection that would yield given keys and values.

    Args:
        saved: of the same base.
        encoder: fresh, as made by the settings; mutated.
        settings: of ``encoder``, for the errors and for what ``init`` means.
        name: of the saved prefix, for the errors.

    Raises:
        ConfigError: the settings cannot be had from this prefix.
    """
    before, now = saved.pre_seq_len, encoder.pre_seq_len
    if encoder.prefix_projection and not saved.prefix_projection:
        raise ConfigError(
            f"`prefix.prefix_projection` is true, but the prefix `{name}` has no projection, and none can be "
            "found that gives its keys and values. Use `prefix.prefix_projection=false`."
        )
    if settings.gate != (saved.gate is not None):
        is_gated = saved.gate is not None
        raise ConfigError(
            f"`prefix.gate` is {str(settings.gate).lower()}, but the prefix `{name}` was tuned "
            f"{'with' if is_gated else 'without'} one, and the same keys and values mean something else "
            f"{'without' if is_gated else 'with'} it: a softmax over prefix and tokens is not one over each. "
            f"Use `prefix.gate={str(is_gated).lower()}`, or begin without `prefix_path`."
        )
    if settings.init != "random" and now <= before:
        raise ConfigError(
            f"`prefix.init` is `{settings.init}`, but the run begins with `{name}`, whose {before} positions "
            f"fill a prefix of {now}: there is nothing to initialise. Leave `prefix.init` out, or raise "
            "`prefix.pre_seq_len`."
        )
    rows = saved.embedding.weight if encoder.prefix_projection else saved.rows()
    rows = rows.to(encoder.embedding.weight.device)
    if encoder.prefix_projection:
        if settings.init == "zero":
            raise ConfigError(
                "`prefix.init` is `zero`, but fresh positions of a projected prefix pass through the "
                f"projection of `{name}`, which makes no zeros. Use `prefix.init=random`, or "
                "`prefix.prefix_projection=false`."
            )
        shapes = [[tuple(w.shape[1:]) for w in part.parameters()] for part in (saved, encoder)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"`prefix.prefix_projection` is true, but the projection of `{name}` has other widths than "
                f"one for this base ({saved.trans[0].in_features} and {saved.trans[0].out_features}; here "
                f"{encoder.trans[0].in_features} and {encoder.trans[0].out_features}). Use "
                "`prefix.prefix_projection=false`: its keys and values are tuned on."
            )
        encoder.trans.load_state_dict(saved.trans.state_dict())
    # Fresh positions are the first that `init` has made, so that an instruction begins at its beginning.
    fresh = encoder.embedding.weight[: max(0, now - before)].clone()
    encoder.embedding.weight.copy_(torch.cat([rows[:now], fresh]))
    if encoder.gate is not None and saved.gate is not None:
        encoder.gate.load_state_dict(saved.gate.state_dict())


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
