"""The fields that chat and completions share: which model, how tokens are chosen, how the reply comes."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from glmtune.errors import ConfigError
from glmtune.inference.requests.sampling import MAX_LOGPROBS, Sampling
from glmtune.inference.settings import MAX_REPETITION_PENALTY, MAX_TEMPERATURE, MIN_REPETITION_PENALTY
from glmtune.serving.api.errors import ApiError, as_api_error

MAX_STOPS = 64
MAX_STOP_CHARS = 1000
MAX_BIASES = 1024
_SEEDS = 2**63


def broken_rule(rule: str) -> PydanticCustomError:
    """Return the error of a value; ``rule`` goes on after "but it", such as "must be text"."""
    # A template of pydantic's: its own brackets would be taken for names.
    return PydanticCustomError("rule", rule.replace("{", "{{").replace("}", "}}"))  # pyright: ignore


def _stops(value: object) -> tuple[str, ...]:
    texts = (
        [value]
        if isinstance(value, str)
        else value
        if isinstance(value, list)
        else []
        if value is None
        else None
    )
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise broken_rule("must be text or a list of texts")
    if len(texts) > MAX_STOPS or any(len(text) > MAX_STOP_CHARS for text in texts):
        raise broken_rule(f"must hold at most {MAX_STOPS} texts of at most {MAX_STOP_CHARS} characters")
    if not all(texts):
        raise broken_rule("must hold no empty text, which would end every answer at once")
    return tuple(texts)


def _biases(value: object) -> dict[int, float]:
    if value is None:
        return {}
    rule = 'must be an object of numbers from -100 to 100 by token id, such as {"5": -100}'
    if not isinstance(value, dict):
        raise broken_rule(rule)
    if len(value) > MAX_BIASES:
        raise broken_rule(f"must hold at most {MAX_BIASES} tokens")
    biases: dict[int, float] = {}
    for token, bias in value.items():
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not (str(token).isascii() and str(token).isdigit() and len(str(token)) < 10 and is_number):
            raise broken_rule(rule)
        if not -100 <= bias <= 100:
            raise broken_rule(rule)
        biases[int(token)] = float(bias)
    return biases


Stops = Annotated[
    tuple[str, ...],
    BeforeValidator(_stops),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
    ),
]
Biases = Annotated[
    dict[int, float],
    BeforeValidator(_biases),
    WithJsonSchema(
        {"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]}
    ),
]
Penalty = Annotated[float | None, Field(ge=-2, le=2, allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """How a stream is sent."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    include_usage: bool | None = Field(None, description="end with a chunk that counts tokens")


class CommonFields(BaseModel):
    """Fields of chat and completions. A number that is left out is the release's own or the server's."""

    # Types are strict: "0.7" for 0.7 is a mistake in a client that a server should not hide.
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    model: str | None = Field(None, description="the base, a prefix or a LoRA, as /v1/models lists them")
    n: int | None = Field(None, ge=1, description="answers to each prompt")
    stream: bool | None = Field(None, description="send the answer as it is written, as server-sent events")
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(
        None, ge=0, description="most tokens of an answer; default: the server's, or what the context leaves"
    )
    stop: Stops = Field((), description="texts that end an answer; they are left out of it")
    temperature: float | None = Field(
        None,
        ge=0,
        le=MAX_TEMPERATURE,
        allow_inf_nan=False,
        description="0: the likeliest token; default: the release's",
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="likeliest tokens up to this sum; default: the release's",
    )
    top_k: int | None = Field(None, ge=-1, description="so many likeliest tokens; 0 or -1: all")
    min_p: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="share of the likeliest token"
    )
    seed: int | None = Field(
        None, ge=-_SEEDS, lt=_SEEDS, description="of the drawing; answer k of `n` takes seed + k"
    )
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    repetition_penalty: float | None = Field(
        None,
        ge=MIN_REPETITION_PENALTY,
        le=MAX_REPETITION_PENALTY,
        allow_inf_nan=False,
        description="1: none",
    )
    logit_bias: Biases = Field(default_factory=dict, description="added to the logits, by token id")
    ignore_eos: bool | None = Field(None, description="go on where the model would end")
    prefix_strength: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="of a prefix: 1 as tuned, 0 leaves it out"
    )
    adapter_scale: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="of a LoRA: 1 as tuned, 0 leaves it out"
    )

    @property
    def num_answers(self) -> int:
        """How many answers each prompt gets."""
        return 1 if self.n is None else self.n

    @property
    def has_usage_chunk(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


def check_common(fields: CommonFields, *, max_choices: int, num_prompts: int = 1) -> None:
    """Check the rules between fields.

    Raises:
        ApiError: too many answers, or options of a stream without one.
    """
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(
            '`stream_options` is given, but `stream` is not true. Add `"stream": true`, or leave it out.',
            param="stream_options",
            code="invalid_value",
        )
    if (asked := fields.num_answers * num_prompts) > max_choices:
        each = f"{num_prompts} prompts with " if num_prompts > 1 else ""
        raise ApiError(
            f"{each}`n` {fields.num_answers} asks for {asked} answers, but at most {max_choices} are given at"
            " once. Ask several times.",
            param="n" if fields.num_answers > 1 else "prompt",
            code="invalid_value",
        )


def sampling_of(
    fields: CommonFields,
    defaults: Sampling,
    *,
    max_new_tokens: int | None,
    logprobs: int | None,
    vocabulary: int,
    prompt_logprobs: int | None = None,
) -> Sampling:
    """Return how the tokens of a request are chosen.

    Args:
        fields: of the request.
        defaults: what holds where it says nothing.
        max_new_tokens: limit of the answer.
        logprobs: see `Sampling`.
        vocabulary: how many token ids there are.
        prompt_logprobs: see `Sampling`.

    Raises:
        ApiError: a rule is broken, by the field's name.
    """
    if beyond := [token for token in fields.logit_bias if token >= vocabulary]:
        raise ApiError(
            f"`logit_bias` names the token {beyond[0]}, but the model's tokens are 0 to {vocabulary - 1}.",
            param="logit_bias",
            code="invalid_value",
        )
    names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    given: dict[str, Any] = {
        name: getattr(fields, name) for name in names if getattr(fields, name) is not None
    }
    if fields.top_k is not None:
        given["top_k"] = max(fields.top_k, 0)  # vLLM's clients write -1 for all
    try:
        return replace(
            defaults,
            **given,
            max_new_tokens=max_new_tokens,
            logit_bias=fields.logit_bias,
            seed=None if fields.seed is None else fields.seed % _SEEDS,
            stop=fields.stop,
            ignore_eos=bool(fields.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
    except ConfigError as error:
        raise as_api_error(error) from None


def check_logprobs(value: int | None, name: str) -> None:
    """Raise ApiError unless so many alternatives may be asked for."""
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise ApiError(
            f"`{name}` is {value}, but it must be from 0 to {MAX_LOGPROBS}.", param=name, code="invalid_value"
        )


def choices_of(sampling: Sampling, num_answers: int) -> tuple[Sampling, ...]:
    """Return how the tokens of each answer to a prompt are chosen: answer k of a seed takes seed + k."""
    if sampling.seed is None or num_answers == 1:
        return (sampling,) * num_answers
    return tuple(replace(sampling, seed=(sampling.seed + number) % _SEEDS) for number in range(num_answers))
