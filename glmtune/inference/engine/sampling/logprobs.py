"""What is reported about tokens: their log-probabilities under the model itself, and the likeliest others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glmtune.inference.requests.request import TokenLogprob


def token_logprobs(logits_SV: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """Return how likely tokens were, before temperature, penalties and biases.

    Args:
        logits_SV: float32, as the model gives them; left as they are.
        token_ids: S tokens, each predicted by its row.
        num_top: how many of the likeliest tokens to name with each, S numbers.
    """
    if not len(token_ids):
        return []
    chosen_S1 = torch.tensor(list(token_ids), device=logits_SV.device).unsqueeze(1)
    total_S1 = logits_SV.logsumexp(dim=-1, keepdim=True)
    chosen = (logits_SV.gather(1, chosen_S1) - total_S1).squeeze(1).tolist()
    most = min(max(num_top), logits_SV.shape[1])
    if not most:
        return [TokenLogprob(*entry) for entry in zip(token_ids, chosen, strict=True)]
    top_ST, ids_ST = logits_SV.topk(most, dim=-1)
    tops = zip(ids_ST.tolist(), (top_ST - total_S1).tolist(), strict=True)
    pairs = [list(zip(ids, values, strict=True)) for ids, values in tops]
    return [
        TokenLogprob(token_id, value, tuple(top[:num]))
        for token_id, value, top, num in zip(token_ids, chosen, pairs, num_top, strict=True)
    ]


def prompt_logprobs(logits_SV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Return how likely the tokens of a prompt were.

    Args:
        logits_SV: float32; row i is what the model says about token i, having read the one before it.
        token_ids: S tokens. The first token of a prompt, before which there is nothing, is not among them.
        num_top: how many of the likeliest tokens to name with each.
    """
    return token_logprobs(logits_SV, token_ids, [num_top] * len(token_ids))
