"""Log-probabilities of a few next tokens: each prompt is read once and one position gets logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from glmtune.inference.engine.budget import Budget, no_memory
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.prompt_cache import PromptCache
from glmtune.inference.engine.prompt_groups import PromptGroup, SharedPrompt, TokenIds
from glmtune.inference.engine.reading import Before
from glmtune.memory import is_out_of_memory, release_memory

_Found = TypeVar("_Found")
Scores = tuple[float, ...]


def score_group(
    model: EngineModel,
    budget: Budget,
    cache: PromptCache,
    group: PromptGroup,
    prompts: Sequence[tuple[int, ...]],
    candidates: Sequence[Sequence[int]],
) -> Iterator[tuple[int, Scores]]:
    """Score the prompts of a group; see `read_group`.

    Args:
        model: what reads them.
        budget: how many at once, mutated when memory runs out.
        cache: holds the shared prompts.
        group: which prompts, and what they share.
        prompts: token ids of all prompts.
        candidates: per prompt the ids asked for.

    Yields:
        Place of the prompt and its log-probabilities.

    Raises:
        GlmtuneError: memory does not suffice for one prompt.
    """

    def scores(last_hidden_BD: Tensor, places: Sequence[int]) -> list[Scores]:
        return _scores(model, last_hidden_BD, [candidates[place] for place in places])

    yield from read_group(model, budget, cache, group, prompts, scores)


def read_group(
    model: EngineModel,
    budget: Budget,
    cache: PromptCache,
    group: PromptGroup,
    prompts: Sequence[tuple[int, ...]],
    use: Callable[[Tensor, Sequence[int]], Sequence[_Found]],
) -> Iterator[tuple[int, _Found]]:
    """Read the prompts of a group, longest first; the batch halves when memory runs out.

    Args:
        model: what reads them.
        budget: how many at once, mutated when memory runs out.
        cache: holds the shared prompts.
        group: which prompts, and what they share.
        prompts: token ids of all prompts.
        use: makes of the last hidden states ``[B, D]`` of prompts, whose places it is given, what is yielded.

    Yields:
        Place of the prompt and what was made of it.

    Raises:
        GlmtuneError: memory does not suffice for one prompt.
    """
    shared = cache.get(prompts[group.members[0]][: group.num_shared])
    waiting = list(group.members)
    while waiting:
        lengths = [len(prompts[place]) - group.num_shared for place in waiting[: budget.rows]]
        batch = waiting[: budget.rows_to_read(lengths, [group.num_shared] * len(lengths))]
        own = [prompts[place][group.num_shared :] for place in batch]
        found = _try_reading(model, shared, own, lambda hidden_BD, places=batch: use(hidden_BD, places))
        if found is None:
            if len(batch) == 1:
                raise no_memory(len(prompts[batch[0]]))
            budget.halve(len(batch))
            continue
        del waiting[: len(batch)]
        yield from zip(batch, found, strict=True)


def _try_reading(
    model: EngineModel,
    shared: SharedPrompt,
    own: Sequence[TokenIds],
    use: Callable[[Tensor], Sequence[_Found]],
) -> Sequence[_Found] | None:
    """Read a batch; None where memory ran out (whatever it held is free again on return)."""
    try:
        return use(model.read(own, [Before(shared.layers)], keep=False).last_hidden_BD)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Not in the except block: while the error lives, its traceback keeps the tensors of what failed.
    release_memory()
    return None


@torch.no_grad()
def _scores(model: EngineModel, last_hidden_BD: Tensor, candidates: Sequence[Sequence[int]]) -> list[Scores]:
    logits_BV = model.logits(last_hidden_BD)
    total_B1 = logits_BV.logsumexp(dim=-1, keepdim=True)
    width = max(map(len, candidates))
    # Padded with token 0, which every vocabulary has; its scores are cut off below.
    padded = [[*ids, *[0] * (width - len(ids))] for ids in candidates]
    chosen_BC = logits_BV.gather(1, torch.tensor(padded, device=logits_BV.device)) - total_B1
    return [tuple(row[: len(ids)]) for row, ids in zip(chosen_BC.tolist(), candidates, strict=True)]
