"""What beam search does to the next-token scores; the outcome does not depend on which rows share a batch."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from glmtune.inference.settings import GenerationSettings
from glmtune.models.checkpoints.finite import check_output


class StopAtNotFinite(LogitsProcessor):
    """Ends the search where scores are NaN or infinite; goes first, as others put infinities in."""

    def __init__(self, model: nn.Module) -> None:
        """Keep the model, whose weights are searched then."""
        self.model = model

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities as they are.

        Raises:
            GlmtuneError: see `check_output`.
        """
        check_output(self.model, scores)
        return scores


class PaddedRepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """The usual repetition penalty, blind to left padding.

    The stock one counts the padding token as seen, so a short prompt in a batch would get other logits than
    alone wherever the padding token is one the model may emit.
    """

    def __init__(self, penalty: float, attention_mask_BS: Tensor, num_beams: int) -> None:
        """Keep where the padding is.

        Args:
            penalty: above 0; 1 changes nothing.
            attention_mask_BS: int64 ``[batch, prompt]``, 0 on padding, which is on the left.
            num_beams: rows of the logits per row of the batch.
        """
        super().__init__(float(penalty))
        self.padding_BS = (attention_mask_BS == 0).repeat_interleave(num_beams, dim=0)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Penalize the tokens of the prompt and of the answer so far.

        Args:
            input_ids: ``[batch * beams, prompt + answer so far]``.
            scores: logits ``[batch * beams, vocab]``.

        Returns:
            New logits of the same shape.
        """
        prompt_length = self.padding_BS.shape[1]
        # Padding is given the prompt's last token, which counts as seen anyway.
        last_of_prompt = input_ids[:, prompt_length - 1 : prompt_length]
        prompt = torch.where(self.padding_BS, last_of_prompt, input_ids[:, :prompt_length])
        seen = torch.cat([prompt, input_ids[:, prompt_length:]], dim=1)
        return super().__call__(cast("torch.LongTensor", seen), scores)


def logits_processors(
    model: nn.Module, settings: GenerationSettings, attention_mask_BS: Tensor
) -> LogitsProcessorList:
    """Return what the settings do to the logits of a batch.

    Args:
        model: which computes them.
        settings: penalty and number of beams.
        attention_mask_BS: int64 ``[batch, prompt]`` of the left-padded prompts.
    """
    processors = LogitsProcessorList([StopAtNotFinite(model)])
    if settings.repetition_penalty != 1.0:
        processors.append(
            PaddedRepetitionPenalty(settings.repetition_penalty, attention_mask_BS, settings.num_beams)
        )
    return processors
