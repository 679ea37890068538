"""The fields of ``/v1/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

from glmtune.serving.api.errors import ApiError
from glmtune.serving.api.fields.common import CommonFields, broken_rule, check_logprobs

Prompt = str | tuple[int, ...]
"""A text, or token ids as they are."""
_RULE = "must be a text, a list of texts, a list of token ids, or a list of such lists, none of them empty"


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int and each >= 0 for each in value)


def _prompts(value: object) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if _is_ids(value):
        assert isinstance(value, list)
        return (tuple(value),)
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return tuple(value)
        if all(_is_ids(each) for each in value):
            return tuple(tuple(each) for each in value)
    raise broken_rule(_RULE)


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompts = Annotated[
    tuple[Prompt, ...],
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]


class CompletionFields(CommonFields):
    """What ``/v1/completions`` takes."""

    prompt: Prompts = Field(description="what to go on with")
    echo: bool | None = Field(None, description="begin the text with the prompt")
    logprobs: int | None = Field(
        None,
        description="report how likely each token was, with so many others; with echo the prompt's too",
    )

    @property
    def is_prompt_scored(self) -> bool:
        """Whether log-probabilities of the prompt are asked for."""
        return bool(self.echo) and self.logprobs is not None


def check_completion(fields: CompletionFields) -> None:
    """Check the rules of limits and log-probabilities.

    Raises:
        ApiError: a rule is broken.
    """
    check_logprobs(fields.logprobs, "logprobs")
    if fields.max_tokens == 0 and not fields.echo:
        raise ApiError(
            "`max_tokens` is 0, but an answer has at least 1 token. Leave it out for the server's limit; with"
            ' `"echo": true` 0 gives the prompt alone.',
            param="max_tokens",
            code="invalid_value",
        )


def check_ids(ids: Sequence[int], vocabulary: int) -> None:
    """Raise ApiError unless all token ids are of the model."""
    if (largest := max(ids)) >= vocabulary:
        raise ApiError(
            f"`prompt` holds the token {largest}, but the model's tokens are 0 to {vocabulary - 1}.",
            param="prompt",
            code="invalid_value",
        )
