"""What a request changes in its logits before a token is chosen: biases, and penalties on tokens seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glmtune.inference.requests.sampling import Sampling

FIRST_CAPACITY = 256
"""Tokens there is room for at first; the room doubles when it is used up."""


def has_changes(sampling: Sampling) -> bool:
    """Whether a request changes its logits at all."""
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


class LogitChanges:
    """The changes of one request; they grow with the tokens of its answer.

    Biases come first, then the repetition penalty, then the other two: the order of transformers (whose
    processors end there) and of OpenAI's formula, which is a plain sum.
    """

    # Tokens that were seen are kept as tensors of unique ids and how often the answer holds each (0 for those
    # of the prompt alone), so that a step costs a gather and a scatter over them, whatever the vocabulary.

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], device: torch.device) -> None:
        """Start with the tokens of the prompt; only the repetition penalty looks at them."""
        self._sampling = sampling
        self._bias_ids = torch.tensor(list(sampling.logit_bias), dtype=torch.int64, device=device)
        self._biases = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32, device=device)
        seen = list(dict.fromkeys(prompt_ids)) if sampling.repetition_penalty != 1 else []
        self._places = {token_id: place for place, token_id in enumerate(seen)}
        capacity = max(FIRST_CAPACITY, 2 * len(seen))
        self._ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._ids[: len(seen)] = torch.tensor(seen, dtype=torch.int64)
        self._counts = torch.zeros(capacity, dtype=torch.float32, device=device)

    def add(self, token_id: int) -> None:
        """Count a token of the answer."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = torch.cat([self._ids, torch.zeros_like(self._ids)])
            self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
        self._ids[place] = token_id
        self._counts[place] += 1

    def apply(self, logits_V: Tensor) -> None:
        """Change logits, float32 ``[V]``, in place."""
        sampling = self._sampling
        if len(self._bias_ids):
            logits_V[self._bias_ids] += self._biases
        if not self._places:
            return
        ids, counts = self._ids[: len(self._places)], self._counts[: len(self._places)]
        seen = logits_V[ids]
        if sampling.repetition_penalty != 1:
            penalty = sampling.repetition_penalty
            seen = torch.where(seen < 0, seen * penalty, seen / penalty)
        seen -= sampling.presence_penalty * (counts > 0) + sampling.frequency_penalty * counts
        logits_V[ids] = seen
