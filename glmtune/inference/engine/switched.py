"""Prompts of evaluations over a model whose prefix or LoRA has a switch: which are answered with it.

The base reads all prompts first, what they share once. Then those that are switched on are worked through
with what is attached, as if there were no switch, and the others with the base alone: so each gives just what
it gives in one of the two models. (Requests of an engine's thread are decided row by row, in `batching`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from glmtune.inference.engine.budget import Budget
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.next_token_scores import read_group
from glmtune.inference.engine.prompt_cache import PromptCache
from glmtune.inference.engine.prompt_groups import PromptGroup
from glmtune.switch.model import switch_of

_Found = TypeVar("_Found")


def decide(
    model: EngineModel,
    budget: Budget,
    groups: Sequence[PromptGroup],
    prompts: Sequence[tuple[int, ...]],
) -> list[bool] | None:
    """Say which prompts the tuned part applies to; None: no switch is attached to the model.

    Args:
        model: with what is attached.
        budget: how much at once, mutated when memory runs out.
        groups: of the prompts.
        prompts: token ids.
    """
    switch = switch_of(model.base)
    if switch is None:
        return None
    decided = [True] * len(prompts)

    def rule(last_hidden_BD: Tensor, _: Sequence[int]) -> list[bool]:
        return switch.decide(last_hidden_BD).tolist()

    with model.base_alone():
        cache = PromptCache(model)
        for group in groups:
            for place, is_tuned in read_group(model, budget, cache, group, prompts, rule):
                decided[place] = is_tuned
    return decided


def apart(
    model: EngineModel,
    decided: Sequence[bool] | None,
    count: int,
    compute: Callable[[Sequence[int]], Iterator[_Found]],
) -> Iterator[tuple[_Found, bool | None]]:
    """Work through prompts that are switched on, then through the others with the base alone.

    Args:
        model: with what is attached.
        decided: from `decide`.
        count: of prompts.
        compute: works through the prompts of these places with the model as it is then.

    Yields:
        What ``compute`` yields, and whether it was tuned; None where nothing decided.
    """
    if decided is None:
        for found in compute(range(count)):
            yield found, None
        return
    if on := [place for place, is_tuned in enumerate(decided) if is_tuned]:
        for found in compute(on):
            yield found, True
    if off := [place for place, is_tuned in enumerate(decided) if not is_tuned]:
        with model.base_alone():
            for found in compute(off):
                yield found, False
