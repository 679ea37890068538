"""Run a model whose weights stay on disk: each module's are read for its forward and dropped after it.

With hooks, so that the model is the class its users run, whoever wrote it. Only modules that own parameters
are hooked (linear layers, norms, embeddings); their forward passes do not overlap, so one's weights are held
at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from glmtune.memory import trim_memory
from glmtune.models.placeholders import is_placeholder, placeholder

NUM_PROBE_TOKENS = 24
"""Enough for ChatGLM-6B to see a context (16 of them) and an answer."""


def stream_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Let a model of placeholders read its weights, float32, as its modules run.

    Args:
        model: made by `build_of_placeholders`, by now perhaps with a prefix or an adapter, whose own weights
            are real.
        weights: native name → tensor.
    """
    for path, module in model.named_modules():
        own = [name for name, value in module.named_parameters(recurse=False) if is_placeholder(value)]
        if own:
            # Names inside PEFT's wrapper: the model is one level down, an adapted layer's own weight too.
            prefix = path.removeprefix("base_model.model.").replace(".base_layer", "")
            names = {name: f"{prefix}.{name}" for name in own}
            module.register_forward_pre_hook(_filling(names, weights))
            module.register_forward_hook(_emptying(names))


def probe_ids(config: Any) -> Tensor:
    """Return token ids ``[1, S]`` spread over the vocabulary, in the layout the model expects.

    Args:
        config: as made by `native_config`; the first generation's ends with gMASK, sop and some more ids.
    """
    spread = torch.linspace(5, config.vocab_size - 1, NUM_PROBE_TOKENS).long()
    special = (getattr(config, "gmask_token_id", None), config.bos_token_id)  # None: not the first generation
    if special[0] is None:
        return spread[None]
    context, answer = spread.tolist()[:16], spread.tolist()[16:]
    is_plain = [token for token in context if token < special[0]]
    return torch.tensor([[*is_plain, *special, *(token for token in answer if token < special[0])]])


@torch.no_grad()
def probe_logits(model: nn.Module, input_ids: Tensor, on_module: Callable[[int, int], object]) -> Tensor:
    """Return the logits of one row.

    Args:
        model: as left by `stream_weights`.
        input_ids: int64 ``[1, S]``.
        on_module: told after each streamed module how many have run, and of how many.

    Returns:
        float32 ``[S, vocab]``.
    """
    streamed = [m for m in model.modules() if any(map(is_placeholder, m.parameters(recurse=False)))]
    done = count(1)
    hooks = [m.register_forward_hook(lambda *_: on_module(next(done), len(streamed))) for m in streamed]
    try:
        return model(input_ids=input_ids, use_cache=False).logits[0].float()
    finally:
        for hook in hooks:
            hook.remove()


def _filling(names: dict[str, str], weights: Mapping[str, Tensor]) -> Callable[..., None]:
    def fill(module: nn.Module, _: object) -> None:
        for name, source in names.items():
            getattr(module, name).data = weights[source].float()

    return fill


def _emptying(names: dict[str, str]) -> Callable[..., None]:
    def empty(module: nn.Module, _: object, __: object) -> None:
        for name in names:
            getattr(module, name).data = placeholder(getattr(module, name).shape)
        trim_memory()

    return empty
