"""What a request may ask: checked before it waits, so that it fails where it is asked, and alone."""

from __future__ import annotations

import torch

from glmtune.errors import ConfigError
from glmtune.inference.engine.adapters import RowAdapter
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.requests.request import Request
from glmtune.models.architectures.chatglm_inputs import token_positions


def most_new_tokens(request: Request, adapter: RowAdapter, model: EngineModel, *, held_tokens: int) -> int:
    """Return the most new tokens of a request: what it asks for, or all that there is room for.

    Args:
        request: what is asked.
        adapter: what it runs with.
        model: the model.
        held_tokens: columns of keys and values that the engine holds at most.

    Raises:
        ConfigError: it can never fit, or its ids are none of the model's.
        DataError: ChatGLM-6B: the prompt lacks the tokens that say where the answer begins.
    """
    _check_ids(request, model)
    length, asked = len(request.prompt_ids), request.sampling.max_new_tokens
    context: int = model.config.max_position_embeddings
    wish = "not set (at least 1)" if asked is None else str(asked)
    if length + (asked or 1) > context:
        raise ConfigError(
            f"The prompt has {length} tokens and `max_new_tokens` is {wish}, but the model's context is"
            f" {context} tokens. Shorten the prompt, or lower `max_new_tokens`."
        )
    prefix = adapter.num_columns
    if prefix + length + (asked or 1) > held_tokens:
        front = f"The prefix has {prefix} tokens, the" if prefix else "The"
        raise ConfigError(
            f"{front} prompt has {length} tokens and `max_new_tokens` is {wish}, but the engine holds keys"
            f" and values of {held_tokens} tokens at most. Shorten the prompt, lower `max_new_tokens`, or"
            " raise `engine.max_batch_tokens`, memory permitting."
        )
    return asked or min(context - length, held_tokens - prefix - length)


def _check_ids(request: Request, model: EngineModel) -> None:
    """Refuse what would fail a whole pass, and with it the requests of others."""
    vocab_size: int = model.config.vocab_size
    if not request.prompt_ids:
        raise ConfigError("The prompt has no tokens, but there must be at least one to go on from.")
    wrong = [index for index in request.prompt_ids if not 0 <= index < vocab_size]
    if wrong:
        raise ConfigError(
            f"The prompt holds token id {wrong[0]}, but the model's ids go from 0 to {vocab_size - 1}."
            " Encode with the tokenizer of this model."
        )
    request.sampling.check_vocabulary(vocab_size)
    if not model.can_share:
        token_positions(torch.tensor([request.prompt_ids]), model.config)
