"""Changes to the next-token logits whose outcome does not depend on which rows share a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glmtune.inference.settings import GenerationSettings


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


class SeededChoice(LogitsProcessor):
    """Sampling as a logits processor: leaves one finite logit per row, drawn with the row's own numbers.

    Each row has a stream of random numbers fixed by (seed, row), one number per step; so a row's answer is
    the same in any batch, in any order, and after a resume. (transformers' sampling draws for all rows of a
    batch from one global stream.)
    """

    def __init__(self, seed: int, rows: Sequence[int], *, prompt_length: int, max_new_tokens: int) -> None:
        """Draw the numbers of all steps.

        Args:
            seed: of the run.
            rows: a number per row of the batch that stays the same across batches.
            prompt_length: padded length of the prompts, in tokens.
            max_new_tokens: most steps there can be.
        """
        streams = [np.random.default_rng([seed, row]).random(max_new_tokens) for row in rows]
        self.draws_BT = torch.tensor(np.array(streams), dtype=torch.float32)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Choose one token per row by inverting the cumulative distribution, likeliest tokens first.

        Args:
            input_ids: ``[batch, prompt + answer so far]``.
            scores: float32 logits ``[batch, vocab]``, excluded tokens at minus infinity.

        Returns:
            Logits with 0 at the chosen token and minus infinity elsewhere.
        """
        step = input_ids.shape[1] - self.prompt_length
        probabilities, order = scores.float().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        total = probabilities.cumsum(dim=-1)
        draw = self.draws_BT[:, step : step + 1].to(scores.device) * total[:, -1:]
        # Rounding may leave the sum below the draw: then the last token that has any probability.
        place = (total <= draw).sum(dim=-1, keepdim=True)
        last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
        chosen = order.gather(1, torch.minimum(place, last))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def logits_processors(
    settings: GenerationSettings, attention_mask_BS: Tensor, rows: Sequence[int]
) -> LogitsProcessorList:
    """Return what the settings do to the logits of a batch, in the order transformers applies it.

    Args:
        settings: penalty and sampling.
        attention_mask_BS: int64 ``[batch, prompt]`` of the left-padded prompts.
        rows: a lasting number per row, see ``SeededChoice``.
    """
    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        processors.append(
            PaddedRepetitionPenalty(settings.repetition_penalty, attention_mask_BS, settings.num_beams)
        )
    if settings.do_sample:
        temperature, top_k, top_p = settings.sampling
        processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k > 0:
            processors.append(TopKLogitsWarper(top_k=top_k))
        if top_p < 1.0:
            processors.append(TopPLogitsWarper(top_p=float(top_p)))
        prompt_length = attention_mask_BS.shape[1]
        processors.append(
            SeededChoice(
                settings.seed, rows, prompt_length=prompt_length, max_new_tokens=settings.max_new_tokens
            )
        )
    return processors
