"""Generation one token at a time, with a cache that a later turn of the conversation can go on from.

transformers' streamers push tokens into a queue from a second thread, which runs on when its reader stops.
Here `generate` prepares everything (settings, processors, stopping rules, cache) and then calls `_decode`, a
generator instead of its loop: whoever stops reading stops the model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import LogitsProcessor

from glmtune.models.architectures.kv_cache import LAYERS

LOGGER = logging.getLogger(__name__)

SAFE_TOKEN = 5
"""The token the releases fall back to when the logits are damaged, counted from the first text token
(``InvalidScoreLogitsProcessor`` in their modeling files)."""

PREFILL_CHUNK_TOKENS = 1024
"""Queries read at once where a mask must be written out (padding, tokens before them), one row per query: a
long text on top of a long conversation would otherwise need a mask of new tokens x all tokens at once."""


class ConversationCache(DynamicCache):
    """Keys and values of a conversation, and the tokens they belong to.

    The last token may still be missing from the keys and values: it was drawn and not yet read.

    Attributes:
        token_ids: every token of the conversation so far, without the one that ended the last answer.
        kv_cache: how keys and values are kept, one of `glmtune.models.settings.KV_CACHES`.
        prefix_strength: with which the tokens were read: what later layers hold depends on it.
        is_tuned: whether what was tuned applied to the tokens, where a switch decided; None where none did.
    """

    def __init__(self, kv_cache: str = "plain", prefix_strength: float = 1.0) -> None:
        """Start empty; arguments see the class."""
        super().__init__()
        self.token_ids: list[int] = []
        self.kv_cache = kv_cache
        self.prefix_strength = prefix_strength
        self.is_tuned: bool | None = None
        self.layer_class_to_replicate = LAYERS[kv_cache]

    def fork(self) -> ConversationCache:
        """Return a cache that grows on its own; what is there already is shared, not copied."""
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]  # a copied layer grows in memory of its own
        twin.token_ids = list(self.token_ids)
        return twin


class RepairScores(LogitsProcessor):
    """Make damaged rows of logits certain of one token, as the releases do, so that sampling goes on.

    A row is damaged by NaN or plus infinity, or if no score is finite. Minus infinity bans a token.
    """

    def __init__(self, safe_token: int = SAFE_TOKEN) -> None:
        """Keep the id of the token."""
        self.safe_token = safe_token
        self._has_warned = False  # one line an answer, not one a token

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[B, vocab]`` with damaged rows replaced."""
        overflown, finite = scores.isnan() | scores.isposinf(), scores.isfinite()
        damaged_B1 = overflown.any(-1, keepdim=True) | ~finite.any(-1, keepdim=True)
        if not self._has_warned and bool(damaged_B1.any()):
            self._has_warned = True
            LOGGER.warning(
                "The model's scores hold no usable number at token %d, so a filler is written there, as the "
                "releases do, and the answer will be of no use. Its weights are damaged, or too large for "
                "%s: load it with dtype='bfloat16' or 'float32', or download it again.",
                input_ids.shape[1], scores.dtype,
            )  # fmt: skip
        certain = torch.zeros_like(scores)
        certain[:, self.safe_token] = 5e4
        return torch.where(damaged_B1, certain, scores)


class StopStrings(StoppingCriteria):
    """Ends an answer at the first of some texts, wherever in its tokens they begin and end.

    transformers' own looks for them in the texts of single tokens, which those of a character's bytes and the
    pieces of our tokenizers do not have: it refuses most Chinese ones. Here the end of the answer is decoded.
    """

    def __init__(
        self, texts: Sequence[str], decode: Callable[[Sequence[int]], str], prompt_length: int
    ) -> None:
        """Keep what to look for.

        Args:
            texts: any of them ends the answer.
            decode: ids to text.
            prompt_length: tokens before the answer.
        """
        self.texts = texts
        self.decode = decode
        self.prompt_length = prompt_length
        # A token is at least a byte of text; some more, as decoding may drop blanks at the start.
        self.num_tokens = max(len(text.encode("utf-8", "surrogatepass")) for text in texts) + 8

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Return which rows of ``[B, S]`` end, ``[B]``."""
        answers = input_ids[:, self.prompt_length :][:, -self.num_tokens :].tolist()
        ended = [any(text in self.decode(answer) for text in self.texts) for answer in answers]
        return cast("torch.BoolTensor", torch.tensor(ended, device=input_ids.device))


def prompt_inputs(model: Any, token_ids: Sequence[int]) -> dict[str, Tensor]:
    """Return a prompt as ``generate`` takes it, ids and an all-ones mask, both ``[1, S]``."""
    input_ids_1S = torch.tensor([list(token_ids)], device=model.device)
    return {"input_ids": input_ids_1S, "attention_mask": torch.ones_like(input_ids_1S)}


def stream_tokens(model: Any, token_ids: Sequence[int], **settings: Any) -> Iterator[tuple[int, bool]]:
    """Generate one answer; closing the iterator stops the generation.

    Args:
        model: a causal LM with transformers' ``generate``.
        token_ids: the prompt; with ``cache`` the whole conversation, of which only what the cache
            does not hold yet is read.
        **settings: what ``generate`` takes, for one sequence without beams.

    Yields:
        The next token, and whether it is the last.
    """
    return model.generate(**prompt_inputs(model, token_ids), custom_generate=_decode, **settings)


@torch.no_grad()
def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Iterator[tuple[int, bool]]:
    """Do what `generate` does after its preparations, but hand out every token at once."""
    # Called by `generate` of transformers 5 as `custom_generate`, in place of its own loop (`_sample`),
    # whose steps these are; stopping rules see the new token before it is handed out.
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    finished = False
    while not finished:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        scores = logits_processor(input_ids, outputs.logits[:, -1].float())  # pyright: ignore[reportArgumentType]
        if generation_config.do_sample:
            token_11 = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
        else:
            token_11 = scores.argmax(dim=-1, keepdim=True)
        input_ids = torch.cat([input_ids, token_11], dim=1)
        finished = bool(stopping_criteria(input_ids, None).all())  # pyright: ignore[reportArgumentType,reportAttributeAccessIssue]
        yield int(token_11), finished
        if not finished:
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
            outputs = model(**inputs, return_dict=True)
