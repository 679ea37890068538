"""Attach a prefix to a base model, detach it, and freeze everything else.

The decoder stack inside the causal LM gets the encoder as its submodule ``prefix_encoder`` and one forward
hook, which hands the prefix to the layers as the keyword argument ``prefix_key_values`` (gates, if it has
some, as ``prefix_gates``). Nothing is kept between forwards and nothing enters the generation cache; token
positions are not shifted::

    model(input_ids)
      decoder stack   -- pre-hook: encoder computes [L, 2, P, K, H] once, adds it to the keyword arguments
        layer l       -- passes unknown keyword arguments on to its attention (as transformers' layers do)
          attention   -- `glmtune.prefix.attention` takes layer l's keys and values out of it

A submodule, so that optimizers, `state_dict`, ``.to()`` and DeepSpeed find the prefix like any other weight;
a hook rather than a patched ``forward``, so that copies, pickles and PEFT's wrappers keep working.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from glmtune.errors import ConfigError, ShapeError
from glmtune.prefix.attention import CARRYING, WITH_PREFIX, register_attention
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape

_ATTACHMENT = "_glmtune_prefix"


@dataclass
class _Attachment:
    """What `detach_prefix` needs; lives on the base model and is copied and pickled with it."""

    hook: RemovableHandle
    stock_attention: str

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register_attention()  # a model unpickled in a fresh process finds our attention by name


def attach_prefix(model: PreTrainedModel, encoder: PrefixEncoder, *, strength: float = 1.0) -> None:
    """Let every forward of a model see a prefix; a prefix attached before is detached first.

    The model's attention implementation is switched to our variant of the same one, the encoder moves to the
    model's device and takes its training mode. Call `freeze_base` to train the prefix alone.

    Args:
        model: a causal LM (or its decoder stack), mutated.
        encoder: becomes the submodule ``prefix_encoder`` of the decoder stack.
        strength: of every forward that names none, see `set_strength`.

    Raises:
        ConfigError: the attention implementation cannot carry a prefix.
        ShapeError: the encoder was made for another geometry.
    """
    # First, as the attention's name is ours while a prefix is attached, and the check below wants the stock
    # one.
    detach_prefix(model)
    base = _decoder(model)
    stock = str(model.config._attn_implementation)
    if stock not in WITH_PREFIX:
        raise ConfigError(
            f"The model's attention implementation is `{stock}`, but a prefix needs one of "
            f"{_listed(WITH_PREFIX)}. "
            "Call `model.set_attn_implementation('sdpa')` before attaching the prefix."
        )
    expected = prefix_shape(model.config)
    if encoder.shape != expected:
        raise ShapeError(
            f"The prefix was made for {encoder.shape}, but the model has {expected}. "
            "Use the base the prefix was trained on, or make a new prefix for this model."
        )
    register_attention()
    model.set_attn_implementation(WITH_PREFIX[stock])
    base.prefix_encoder = encoder.to(_embeddings(base).device).train(model.training)
    hook = base.register_forward_pre_hook(_hand_down_prefix, with_kwargs=True)
    setattr(base, _ATTACHMENT, _Attachment(hook, stock))
    set_strength(model, strength)


def set_strength(model: PreTrainedModel, strength: float) -> None:
    """Choose how much the attached prefix counts wherever nothing else is asked for.

    Args:
        model: with a prefix, mutated.
        strength: 1 is the prefix as its file has it, 0 the bare base; log of it is added to the scores of the
            prefix's columns.
    """
    base: Any = _decoder(model)
    base.prefix_strength = strength


def strength_of(model: PreTrainedModel) -> float:
    """Return how much the attached prefix counts where nothing is asked for, its file's own included."""
    encoder = prefix_of(model)
    assert encoder is not None
    return encoder.strength * float(getattr(_decoder(model), "prefix_strength", 1.0))


def detach_prefix(model: PreTrainedModel) -> PrefixEncoder | None:
    """Take the prefix off a model and restore its stock attention.

    Args:
        model: the model given to `attach_prefix`, mutated.

    Returns:
        The encoder that was attached, or None if there was none.
    """
    base = _decoder(model)
    encoder = prefix_of(model)
    if encoder is None:
        return None
    attachment: _Attachment = getattr(base, _ATTACHMENT)
    attachment.hook.remove()
    # Unless somebody changed the attention meanwhile, whose choice then stays.
    if model.config._attn_implementation == WITH_PREFIX[attachment.stock_attention]:
        model.set_attn_implementation(attachment.stock_attention)
    delattr(base, _ATTACHMENT)
    del base.prefix_encoder, base.prefix_strength
    return encoder


def prefix_of(model: PreTrainedModel) -> PrefixEncoder | None:
    """Return the encoder attached to a model, or None."""
    return getattr(_decoder(model), "prefix_encoder", None)


@contextmanager
def without_prefix(model: PreTrainedModel) -> Generator[None]:
    """Run a block with the bare base, then put the same prefix back (also after an error)."""
    strength = getattr(_decoder(model), "prefix_strength", 1.0)
    encoder = detach_prefix(model)
    try:
        yield
    finally:
        if encoder is not None:
            attach_prefix(model, encoder, strength=strength)


def freeze_base(model: PreTrainedModel) -> int:
    """Stop all parameters from training except those of the attached prefix.

    Args:
        model: mutated: ``requires_grad`` becomes False for the base and True for the prefix.

    Returns:
        How many numbers (parameter elements) of the base are frozen.
    """
    encoder = prefix_of(model)
    own = {id(weight) for weight in encoder.parameters()} if encoder is not None else set()
    frozen = 0
    for weight in model.parameters():
        if id(weight) in own:
            weight.requires_grad_(True)
        else:
            weight.requires_grad_(False)
            frozen += int(getattr(weight, "ds_numel", weight.numel()))  # ZeRO-3 leaves local weights empty
    return frozen


def _decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the stack of decoder layers inside a causal LM, or the model itself if it is one."""
    return model.base_model  # pyright: ignore[reportReturnType]


def _embeddings(base: PreTrainedModel) -> Tensor:
    return base.get_input_embeddings().weight  # pyright: ignore[reportReturnType]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _hand_down_prefix(
    base: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the decoder stack: add ``prefix_key_values`` for this batch to its arguments.

    ``prefix_strength`` comes as a keyword of the same forward, or is that of the model; it goes on to the
    layers beside the prefix, or into the gates of a gated one, ``prefix_gates``. So does ``tuned_rows``, bool
    ``[B]``: rows where it is False do not see the prefix.
    """
    _check_can_carry(base)
    encoder: Any = base.prefix_encoder
    kwargs = dict(kwargs)
    strength: float = encoder.strength * kwargs.pop("prefix_strength", base.prefix_strength)
    if strength == 0:  # log 0: no weight at all, so the layers see no prefix
        kwargs.pop("tuned_rows", None)
        return args, kwargs
    input_ids: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
    inputs: Tensor = kwargs["inputs_embeds"] if input_ids is None else input_ids
    # Embeddings may be codes, which say beside them what their rows become.
    embedding: Any = base.get_input_embeddings()
    dtype = getattr(embedding, "output_like", embedding.weight).dtype
    kwargs["prefix_key_values"] = encoder.layer_states(inputs.shape[0], dtype)
    if encoder.gate is not None:
        kwargs["prefix_gates"] = encoder.layer_gates(strength)
    elif strength != 1:
        kwargs["prefix_strength"] = strength
    return args, kwargs


def _check_can_carry(base: nn.Module) -> None:
    """Raise ConfigError where the prefix would be ignored or get no gradient."""
    implementation = base.config._attn_implementation  # pyright: ignore[reportAttributeAccessIssue]
    if implementation not in CARRYING:
        raise ConfigError(
            f"The attention implementation was changed to `{implementation}` while a prefix is attached; "
            f"it would ignore the prefix, which needs one of {_listed(WITH_PREFIX.values())}. "
            "Detach the prefix, change the implementation, and attach it again."
        )
    # Reentrant checkpointing runs a layer without a graph and again in the backward pass, and connects it
    # through those positional arguments that need a gradient. With a frozen base none does: the prefix comes
    # as a keyword.
    if not (base.training and torch.is_grad_enabled() and getattr(base, "gradient_checkpointing", False)):
        return
    function = getattr(base, "_gradient_checkpointing_func", None)
    if isinstance(function, functools.partial) and function.keywords.get("use_reentrant", True):
        raise ConfigError(
            "Gradient checkpointing runs with `use_reentrant=True`, under which the prefix of a frozen base "
            "gets no gradient; it must be False. "
            "Set `gradient_checkpointing_kwargs={'use_reentrant': False}`."
        )
