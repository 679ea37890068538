"""One finished answer, as a line of a journal or of a file of saved completions has it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from evaluation.sample import ChoiceScores
from glmtune.storage.checksums import checked_line, with_checksum
from glmtune.storage.records import MAX_COUNT, Count, OptionalText, Record, Text, validated

Key = tuple[str, int]
"""What names a question inside its benchmark: subject and index."""

TOO_LONG = "too_long"
"""Not a stop reason of a model: the question does not fit its context, so it was not asked."""
MAX_CHOICES = 1000
"""More than any question has options."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered to one sample.

    Attributes:
        subject: the sample's subject.
        index: its row in the official file, from 0.
        prompt_hash: of what was asked; empty where that is unknown (saved completions).
        completion: generated text; None where nothing is generated.
        choice_logprobs: natural log-probability of each choice; None where none are scored (yet).
        extracted: answer under each rule, None where a rule found nothing.
        stop_reason: ``eos``, ``stop``, ``length`` (truncated), ``too_long`` (not asked: no context holds the
            question), or empty where nothing was generated.
        num_prompt_tokens: tokens of the prompt.
        num_new_tokens: tokens generated.
        num_fewshot: exemplars that were in the prompt.
        seconds: since the answer before it was finished.
        extra: fields of a saved file that mean nothing here; kept.
    """

    subject: str
    index: int
    prompt_hash: str = ""
    completion: str | None = None
    choice_logprobs: tuple[float, ...] | None = None
    extracted: Mapping[str, str | None] = field(default_factory=dict)
    stop_reason: str = ""
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    num_fewshot: int = 0
    seconds: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What names the sample: subject and index."""
        return (self.subject, self.index)

    @property
    def scores(self) -> ChoiceScores | None:
        """The log-probabilities as a record, None without any."""
        if self.choice_logprobs is None:
            return None
        return ChoiceScores(self.choice_logprobs, self.num_prompt_tokens)

    def to_values(self, *, with_timing: bool = True) -> dict[str, Any]:
        """Return the answer as plain values.

        Args:
            with_timing: also give what depends on the clock.
        """
        values: dict[str, Any] = {
            "subject": self.subject,
            "index": self.index,
            "prompt_hash": self.prompt_hash,
            "completion": self.completion,
            "choice_logprobs": None if self.choice_logprobs is None else list(self.choice_logprobs),
            "extracted": dict(self.extracted),
            "stop_reason": self.stop_reason,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_new_tokens": self.num_new_tokens,
            "num_fewshot": self.num_fewshot,
        }
        if with_timing:
            values["seconds"] = round(self.seconds, 4)
        return {**values, **self.extra}

    def to_line(self) -> str:
        """Return the answer as one JSON line with its checksum, newline included."""
        return with_checksum(self.to_values())


class _Line(Record):
    """What a line holds; fields of other tools are let through."""

    subject: Text
    index: Annotated[
        int, Field(ge=0, le=MAX_COUNT, description="a whole number from 0 (the row in the official file)")
    ]
    prompt_hash: Text = ""
    completion: OptionalText = None
    choice_logprobs: Annotated[
        list[Annotated[float, Field(allow_inf_nan=True)]] | None,
        Field(min_length=1, max_length=MAX_CHOICES, description="a list of numbers"),
    ] = None
    extracted: Annotated[
        dict[str, str | None], Field(description="an object with the answer (or null) under each rule")
    ] = Field(default_factory=dict)
    stop_reason: Annotated[
        Literal["eos", "stop", "length", "too_long", ""],
        Field(description="eos, stop, length, too_long or empty"),
    ] = ""
    num_prompt_tokens: Count = 0
    num_new_tokens: Count = 0
    num_fewshot: Count = 0
    seconds: Annotated[float, Field(ge=0, description="a number from 0")] = 0.0

    @field_validator("choice_logprobs")
    @classmethod
    def _are_logarithms(cls, values: list[float] | None) -> list[float] | None:
        # Minus infinity is the logarithm of a probability of 0, and models give it; nothing gives the others.
        if values is not None and any(math.isnan(value) or value == math.inf for value in values):
            raise ValueError("no logarithms")
        return values


KNOWN_FIELDS = frozenset(name for name in Answer.__dataclass_fields__ if name != "extra")


def parse_answer(line: str) -> Answer:
    """Read one line; fields of other tools are kept in ``extra``.

    Args:
        line: a JSON object with at least ``subject`` and ``index``.

    Raises:
        ValueError: it is no such object, it is not the one of its checksum, or a field has a wrong type; the
            message says which.
    """
    try:
        values = checked_line(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no valid JSON ({error.msg})") from None
    known = validated(_Line, values).model_dump()
    logprobs = known.pop("choice_logprobs")
    return Answer(
        **known,
        choice_logprobs=None if logprobs is None else tuple(logprobs),
        extra={name: value for name, value in values.items() if name not in KNOWN_FIELDS},
    )
