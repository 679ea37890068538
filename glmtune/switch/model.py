"""A rule on a model: which prompts of a batch the tuned part applies to, and how a forward is told.

A forward of the decoder stack takes the keyword ``tuned_rows``, bool ``[B]``: rows where it is False are
computed as by the bare base. Given to `generate`, it goes on to every forward, and beams repeat it as they
repeat the rows. A prefix is hidden from these rows by its attention (`glmtune.prefix.attention`), a LoRA by
the hooks below, which make its product zero::

    decoder stack    -- pre-hook: takes `tuned_rows` out of the keywords, notes it
      layer          base(x) + scale * B(A(x))
                                       ^ hook: times 0 in rows that are switched off
    decoder stack    -- hook: forgets it, also after an error

Shapes: B rows, S tokens, D width of hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glmtune.errors import ConfigError
from glmtune.models.architectures.unwrap import unwrapped
from glmtune.switch.rule import Switch

_ATTACHMENT = "_glmtune_switch"


@dataclass(eq=False)
class _Attached:
    """The rule of a LoRA, on the decoder stack of its model; copied and pickled with it.

    Attributes:
        switch: the rule.
        rows: of the forward that runs now; None: all rows are tuned.
        hooks: to be removed.
    """

    switch: Switch
    rows: Tensor | None = None
    hooks: list[Any] = field(default_factory=list[Any])


def switch_of(model: nn.Module) -> Switch | None:
    """Return the rule of the prefix or LoRA in a model; None: it has none, or was told to ignore it.

    Args:
        model: a causal LM, wrapped by PEFT or not.
    """
    base = unwrapped(model)
    if not getattr(base, "use_switch", True):
        return None
    encoder = getattr(base.base_model, "prefix_encoder", None)
    if encoder is not None:
        return encoder.switch
    attached: _Attached | None = getattr(base.base_model, _ATTACHMENT, None)
    return None if attached is None else attached.switch


def attach_switch(model: nn.Module, switch: Switch) -> None:
    """Let the LoRA in a model obey a rule; one attached before goes.

    Args:
        model: with LoRA layers, mutated.
        switch: the rule.

    Raises:
        ShapeError: it was made for another width.
    """
    stack: Any = unwrapped(model).base_model
    switch.check_width(stack.config.hidden_size, "the adapter")
    detach_switch(model)
    attached = _Attached(switch)
    for layer in list(stack.modules()):
        for product in getattr(layer, "lora_B", nn.ModuleDict()).values():
            attached.hooks.append(product.register_forward_hook(partial(_hide_rows, attached)))
    attached.hooks.append(stack.register_forward_pre_hook(partial(_note_rows, attached), with_kwargs=True))
    attached.hooks.append(stack.register_forward_hook(partial(_forget_rows, attached), always_call=True))
    setattr(stack, _ATTACHMENT, attached)


def detach_switch(model: nn.Module) -> None:
    """Take the rule of a LoRA off a model; its adapter then applies to all."""
    stack: Any = unwrapped(model).base_model
    attached: _Attached | None = getattr(stack, _ATTACHMENT, None)
    if attached is not None:
        for hook in attached.hooks:
            hook.remove()
        delattr(stack, _ATTACHMENT)


def base_alone(model: nn.Module, num_rows: int) -> dict[str, Any]:
    """Return the keywords under which a forward of a model with a rule computes the bare base.

    Args:
        model: with a prefix, or with a LoRA and its rule.
        num_rows: B.

    Raises:
        ConfigError: the LoRA was merged into the weights, so that the base is not there any more.
    """
    stack = unwrapped(model).base_model
    if hasattr(stack, "prefix_encoder"):
        return {"prefix_strength": 0}
    layers = [layer for layer in stack.modules() if hasattr(layer, "lora_B")]
    if not layers or any(getattr(layer, "merged", False) for layer in layers):
        raise ConfigError(
            "The model has a switch, but its adapter was merged into the weights, and cannot be switched off "
            "any more. Load it again without merging, or set `model.use_switch = False`: then it "
            "applies to every request."
        )
    device = stack.get_input_embeddings().weight.device
    return {"tuned_rows": torch.zeros(num_rows, dtype=torch.bool, device=device)}


@torch.no_grad()
def decide_prompts(model: nn.Module, switch: Switch, prompts: Sequence[Tensor]) -> Tensor:
    """Say to which prompts the tuned part applies: one forward of the bare base.

    Prompts of one length are read together, none is padded: long ones need no mask then, and no prompt's
    hidden state depends on which others are asked beside it.

    Args:
        model: with a rule (`switch_of`), in any mode; evaluated in evaluation mode.
        switch: its rule.
        prompts: int64 ``[S]`` each, or embeddings ``[S, D]``.

    Returns:
        bool ``[B]``, on the CPU.
    """
    stack: Any = unwrapped(model).base_model
    was_training, decided = stack.training, torch.zeros(len(prompts), dtype=torch.bool)
    stack.eval()
    try:
        for length in sorted({len(prompt) for prompt in prompts}):
            places = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
            inputs = torch.stack([prompts[place] for place in places])
            name = "input_ids" if inputs.dim() == 2 else "inputs_embeds"
            told = {name: inputs, "use_cache": False, **base_alone(model, len(places))}
            decided[places] = switch.decide(stack(**told).last_hidden_state[:, -1]).cpu()
    finally:
        stack.train(was_training)
    return decided


def _note_rows(
    attached: _Attached, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    attached.rows = kwargs.get("tuned_rows")
    return args, {name: value for name, value in kwargs.items() if name != "tuned_rows"}


def _forget_rows(attached: _Attached, *_: object) -> None:
    attached.rows = None


def _hide_rows(attached: _Attached, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Hook of LoRA's second matrix, whose output is ``[B, S, width]``."""
    rows_B = attached.rows
    if rows_B is None:
        return output
    return output * rows_B.to(output).view(-1, *[1] * (output.dim() - 1))


def generation_keywords(
    model: nn.Module, inputs: Tensor | None, given: Mapping[str, Any], *, use_switch: bool | None
) -> dict[str, Any]:
    """Decide for the prompts that `generate` is given, and return the keywords that tell its forwards.

    Args:
        model: a causal LM.
        inputs: prompts ``[B, S]``, where they came as the first argument.
        given: the other arguments: ``input_ids`` or ``inputs_embeds``, and a mask ``[B, S]``, nonzero = real.
        use_switch: False ignores a rule; True insists on one; None obeys one that is there.

    Raises:
        ConfigError: there is no rule to obey.
    """
    switch = switch_of(model)
    if switch is None and use_switch:
        raise ConfigError(
            "`use_switch` is True, but nothing with a switch is attached to this model (or its `use_switch` "
            "is False). Train one with `prefix.switch=true` or `lora.switch=true`, or leave `use_switch` out."
        )
    if switch is None or use_switch is False or given.get("prefix_strength") == 0:
        return {}
    whole = next(
        (each for each in (inputs, given.get("input_ids"), given.get("inputs_embeds")) if each is not None),
        None,
    )
    if whole is None or "tuned_rows" in given:  # nothing to decide by, or decided already
        return {}
    mask = given.get("attention_mask")
    prompts = (
        list(whole) if mask is None else [row[kept.bool()] for row, kept in zip(whole, mask, strict=True)]
    )
    return rows_keywords(model, decide_prompts(model, switch, prompts))


def rows_keywords(model: nn.Module, tuned_B: Tensor) -> dict[str, Any]:
    """Return the keywords of a forward for rows that are decided: none where all are tuned.

    Args:
        model: with a rule.
        tuned_B: bool ``[B]``.
    """
    if tuned_B.all():
        return {}
    if not tuned_B.any():
        return base_alone(model, len(tuned_B))
    return {"tuned_rows": tuned_B.to(unwrapped(model).get_input_embeddings().weight.device)}
