"""Log-probabilities of whole answers under a model.

Shapes: R rows of a batch, S tokens of a row, T labels of all rows in reading order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glmtune.labels import IGNORE_INDEX

MODEL_INPUTS = ("input_ids", "labels", "attention_mask")
"""What the model reads of a batch."""


@dataclass(frozen=True)
class AnswerLogProbs:
    """Of the answers of a batch.

    Attributes:
        sums_R: natural log of the probability of each answer to its prompt, float32; 0 without labels.
        tokens_R: how many tokens each has, int64, its end included.
    """

    sums_R: Tensor
    tokens_R: Tensor

    def means_R(self) -> Tensor:
        """Return the mean per token."""
        return self.sums_R / self.tokens_R.clamp(min=1)

    def part(self, rows: slice) -> AnswerLogProbs:
        """Return those of some rows."""
        return AnswerLogProbs(self.sums_R[rows], self.tokens_R[rows])


def answer_log_probs(model: nn.Module, batch: Mapping[str, Tensor], **keywords: Any) -> AnswerLogProbs:
    """Run a batch through a model; with gradients where they are recorded.

    Logits are formed at the answers only, and of those some at a time.

    Args:
        model: as training wraps it.
        batch: ``input_ids``, ``labels`` and ``attention_mask``, int64 ``[R, S]``; labels are those of the
            answers, −100 elsewhere.
        **keywords: of the forward pass.
    """
    output = model(
        **{name: batch[name] for name in MODEL_INPUTS}, labelled_only=True, each_label=True, **keywords
    )
    tokens_R = answer_tokens(batch["labels"])
    # Split, not scattered: sums of a fixed order, so that a step that is repeated gives the same on a GPU.
    parts = output["losses_T"].split(tokens_R.tolist())
    return AnswerLogProbs(-torch.stack([part.sum() for part in parts]), tokens_R)


def answer_tokens(labels: Tensor) -> Tensor:
    """Return how many labels each row has that something predicts, int64 ``[R]``.

    Args:
        labels: int64 ``[R, S]``.
    """
    return (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)
