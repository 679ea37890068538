"""Log-probabilities of a few next tokens: each prompt is read once and one position gets logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from glmtune.inference.engine.budget import Budget, no_memory
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.prompt_cache import PromptCache
from glmtune.inference.engine.prompt_groups import PromptGroup, SharedPrompt, TokenIds
from glmtune.memory import is_out_of_memory, release_memory

Scores = tuple[float, ...]


def score_group(
    model: EngineModel,
    budget: Budget,
    cache: PromptCache,
    group: PromptGroup,
    prompts: Sequence[tuple[int, ...]],
    candidates: Sequence[Sequence[int]],
) -> Iterator[tuple[int, Scores]]:
    """Score the prompts of a group, longest first; the batch halves when memory runs out.

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
    shared = cache.get(prompts[group.members[0]][: group.num_shared])
    waiting = list(group.members)
    while waiting:
        lengths = [len(prompts[place]) - group.num_shared for place in waiting[: budget.rows]]
        batch = waiting[: budget.rows_to_read(lengths, group.num_shared)]
        own = [prompts[place][group.num_shared :] for place in batch]
        scores = _try_scores(model, shared, own, [candidates[place] for place in batch])
        if scores is None:
            if len(batch) == 1:
                raise no_memory(len(prompts[batch[0]]))
            budget.halve(len(batch))
            continue
        del waiting[: len(batch)]
        yield from zip(batch, scores, strict=True)


def _try_scores(
    model: EngineModel, shared: SharedPrompt, own: Sequence[TokenIds], candidates: Sequence[Sequence[int]]
) -> list[Scores] | None:
    """Score a batch; None where memory ran out (whatever it held is free again on return)."""
    try:
        return _scores(model, shared, own, candidates)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Not in the except block: while the error lives, its traceback keeps the tensors of what failed.
    release_memory()
    return None


@torch.no_grad()
def _scores(
    model: EngineModel, shared: SharedPrompt, own: Sequence[TokenIds], candidates: Sequence[Sequence[int]]
) -> list[Scores]:
    logits_BV = model.logits(model.read(own, shared, keep=False).last_hidden_BD)
    total_B1 = logits_BV.logsumexp(dim=-1, keepdim=True)
    width = max(map(len, candidates))
    # Padded with token 0, which every vocabulary has; its scores are cut off below.
    padded = [[*ids, *[0] * (width - len(ids))] for ids in candidates]
    chosen_BC = logits_BV.gather(1, torch.tensor(padded, device=logits_BV.device)) - total_B1
    return [tuple(row[: len(ids)]) for row, ids in zip(chosen_BC.tolist(), candidates, strict=True)]
