"""How well a model predicts a plain text: the negative log-likelihood of every token.

`glmtune compare` takes the perplexities of a model before and after quantization from it. Answers of
a benchmark flip or do not; every token of a text moves a little, so a short text shows damage that takes
thousands of questions to show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from glmtune.errors import ConfigError, DataError
from glmtune.models.architectures.unwrap import unwrapped
from glmtune.models.checkpoints.finite import check_output

ROWS_PER_LOGITS = 256
"""Positions whose logits are formed at once: with 65,024 words in float32 these are 67 MB, a window of 2,048
would be half a gigabyte."""

Encode = Callable[[str], tuple[list[int], list[int]]]
"""Text to the ids that stand before any text (``[gMASK] sop``), and to its own."""


@torch.no_grad()
def token_losses(model: PreTrainedModel, encode: Encode, text: str, *, window_tokens: int) -> list[Tensor]:
    """Predict every token of a text from those before it in its window.

    Windows follow each other without overlap, each behind ``[gMASK] sop`` of its own, so that every token is
    predicted once. The first tokens of a window have little before them and are predicted worse than they
    would be with overlap; in a comparison of two models that is the same for both, at a fraction of the time.
    ChatGLM-6B sees them as its answer, left to right.

    Args:
        model: in evaluation mode; prefixes and adapters are used as they are.
        encode: of its tokenizer.
        text: as it stands in a file.
        window_tokens: tokens of the text per window.

    Returns:
        One float32 tensor ``[S]`` per window, on the CPU: negative natural log-likelihoods; their number over
        all windows is that of the text's tokens.

    Raises:
        ConfigError: a window with the marks before it is longer than the model's context.
        DataError: the text has no token.
        GlmtuneError: the model's losses are not finite; see `check_output`.
    """
    base = unwrapped(model)
    marks, token_ids = encode(text)
    context: int = base.config.max_position_embeddings
    if window_tokens + len(marks) > context:
        raise ConfigError(
            f"A window of {window_tokens} tokens with the {len(marks)} that stand before a text does not fit"
            f" the model's context of {context}. Use at most {context - len(marks)}."
        )
    if not token_ids:
        raise DataError("The text for the perplexity is empty. Give a text with at least one sentence.")
    device = base.get_input_embeddings().weight.device
    windows = [token_ids[start : start + window_tokens] for start in range(0, len(token_ids), window_tokens)]
    losses: list[Tensor] = []
    for window in windows:
        input_ids_1S = torch.tensor([[*marks, *window]], device=device)
        hidden_SD = base.base_model(input_ids=input_ids_1S, use_cache=False).last_hidden_state[0]
        # The position before a token predicts it: for the first of the window that is the last mark.
        losses.append(_losses(base, hidden_SD[len(marks) - 1 : -1], input_ids_1S[0, len(marks) :]))
        check_output(model, losses[-1])
    return losses


def _losses(base: Any, hidden_SD: Tensor, targets_S: Tensor) -> Tensor:
    head = base.get_output_embeddings()
    parts = [
        torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")
        for hidden, targets in zip(
            hidden_SD.split(ROWS_PER_LOGITS), targets_S.split(ROWS_PER_LOGITS), strict=True
        )
    ]
    return torch.cat(parts).cpu()
