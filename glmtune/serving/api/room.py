"""How long an answer may become, given its prompt and the model's context."""

from __future__ import annotations

from glmtune.serving.api.errors import ApiError


def answer_limit(
    num_prompt_tokens: int, context: int, *, asked: int | None, name: str, default: int | None, param: str
) -> int:
    """Return the most tokens of an answer.

    Args:
        num_prompt_tokens: length of the prompt.
        context: of the model, for prompt and answer.
        asked: what the request asks for; None: nothing.
        name: of the field that asks.
        default: of the server; it gives way to the context.
        param: the field that holds the prompt.

    Raises:
        ApiError: they do not fit, with the three numbers.
    """
    left = context - num_prompt_tokens
    if left < 1:
        raise ApiError(
            f"The prompt has {num_prompt_tokens} tokens, but the model's context is {context} tokens, and"
            " an answer needs at least 1 of them. Shorten the prompt.",
            param=param,
            code="context_length_exceeded",
        )
    if asked is not None and asked > left:
        raise ApiError(
            f"The prompt has {num_prompt_tokens} tokens and `{name}` asks for {asked}, but the model's"
            f" context is {context} tokens, which leaves {left}. Shorten the prompt, or lower `{name}`.",
            param=name,
            code="context_length_exceeded",
        )
    return asked if asked is not None else min(left, default or left)
