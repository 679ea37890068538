"""How the tokens of a request are chosen, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from glmtune.errors import ConfigError
from glmtune.inference.settings import (
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MIN_REPETITION_PENALTY,
)

MAX_LOGPROBS = 20
"""Most alternatives a token is given with, as in OpenAI's interface."""

_WHOLE_NUMBERS = ("max_new_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of a request are chosen, and when it ends.

    Attributes:
        max_new_tokens: most tokens, the one that ends the answer included; None: what the context leaves.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep so many of the likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens up to this sum of probabilities.
        min_p: drop tokens less likely than this share of the likeliest one.
        repetition_penalty: divides the positive, multiplies the negative logits of tokens that the prompt or
            the answer holds, as in transformers; 1 changes nothing.
        presence_penalty: taken off the logits of tokens that the answer holds.
        frequency_penalty: taken off as often as the answer holds the token.
        logit_bias: added to the logits, by token id.
        seed: of the drawing; None draws one.
        stop: texts that end the answer; they are left out of it.
        ignore_eos: go on where the model would end, up to ``max_new_tokens``.
        logprobs: alternatives to report with each token, 0 for the token alone; None reports nothing.
        prompt_logprobs: the same for the tokens of the prompt.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check every rule.

        Raises:
            ConfigError: naming the field, its value and the rule.
        """
        for name in _WHOLE_NUMBERS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"`{name}` is {value!r}, but it must be a whole number.")
        bounds: dict[str, tuple[float, float]] = {
            "temperature": (0.0, MAX_TEMPERATURE),
            "top_k": (0, math.inf),
            "min_p": (0.0, 1.0),
            "presence_penalty": (-2.0, 2.0),
            "frequency_penalty": (-2.0, 2.0),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:  # NaN is refused as well
                limit = f"from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
                raise ConfigError(f"`{name}` is {value}, but it must be {limit}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"`top_p` is {self.top_p}, but it must be above 0 and at most 1.")
        if not MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY:
            raise ConfigError(
                f"`repetition_penalty` is {self.repetition_penalty}, but it must be from"
                f" {MIN_REPETITION_PENALTY:g} to {MAX_REPETITION_PENALTY:g} (1 = none)."
            )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"`max_new_tokens` is {self.max_new_tokens}, but it must be at least 1.")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise ConfigError(f"`{name}` is {value}, but it must be from 0 to {MAX_LOGPROBS}.")
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            raise ConfigError(f"`stop` is {str(self.stop)[:60]!r}, but it must be a tuple of texts.")
        if any(not text for text in self.stop):
            raise ConfigError("`stop` holds an empty text, which would end every answer at once. Remove it.")
        if any(isinstance(token, bool) or not isinstance(token, int) for token in self.logit_bias):
            raise ConfigError("`logit_bias` must have token ids (whole numbers) as keys.")
        if any(not -100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise ConfigError("`logit_bias` must be from -100 to 100 for every token.")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature == 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse a bias on a token that there is not.

        Args:
            vocab_size: logits that the model computes.

        Raises:
            ConfigError: with the token.
        """
        for token_id in self.logit_bias:
            if not 0 <= token_id < vocab_size:
                raise ConfigError(
                    f"`logit_bias` names the token {token_id}, but the model has the tokens 0 to"
                    f" {vocab_size - 1}. Leave it out."
                )
