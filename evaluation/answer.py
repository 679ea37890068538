"""One finished answer, as a line of a journal or of a file of saved completions has it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evaluation.sample import ChoiceScores

Key = tuple[str, int]
"""What names a question inside its benchmark: subject and index."""

TOO_LONG = "too_long"
"""Not a stop reason of a model: the question does not fit its context, so it was not asked."""
STOP_REASONS = ("eos", "stop", "length", TOO_LONG, "")


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

    def to_line(self, *, with_timing: bool = True) -> str:
        """Return the answer as one JSON line, newline included.

        Args:
            with_timing: also write what depends on the clock.
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
        return json.dumps({**values, **self.extra}, ensure_ascii=False) + "\n"


KNOWN_FIELDS = frozenset(name for name in Answer.__dataclass_fields__ if name != "extra")


def parse_answer(line: str) -> Answer:
    """Read one line; fields of other tools are kept in ``extra``.

    Args:
        line: a JSON object with at least ``subject`` and ``index``.

    Raises:
        ValueError: it is no such object, or a field has a wrong type; the message says which.
    """
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no valid JSON ({error.msg})") from None
    if not isinstance(values, dict):
        raise ValueError(f"it must be a JSON object, not {type(values).__name__}")
    logprobs = values.get("choice_logprobs")
    known = {name: value for name, value in values.items() if name in KNOWN_FIELDS}
    for name in ("subject", "index"):
        if name not in values:
            raise ValueError(f"the field `{name}` is missing")
    _check(isinstance(values["subject"], str), "subject", values["subject"], "a text")
    index = values["index"]
    _check(_is_count(index), "index", index, "a whole number from 0 (the row in the official file)")
    completion = values.get("completion")
    _check(completion is None or isinstance(completion, str), "completion", completion, "a text or null")
    _check(logprobs is None or _are_numbers(logprobs), "choice_logprobs", logprobs, "a list of numbers")
    stop_reason = values.get("stop_reason", "")
    _check(stop_reason in STOP_REASONS, "stop_reason", stop_reason, "eos, stop, length, too_long or empty")
    _check(isinstance(values.get("extracted", {}), dict), "extracted", values.get("extracted"), "an object")
    for name in ("num_prompt_tokens", "num_new_tokens", "num_fewshot"):
        _check(_is_count(values.get(name, 0)), name, values.get(name), "a whole number from 0")
    known["choice_logprobs"] = None if logprobs is None else tuple(float(value) for value in logprobs)
    extra = {name: value for name, value in values.items() if name not in KNOWN_FIELDS}
    return Answer(**known, extra=extra)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0  # True is an int in Python


def _are_numbers(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(item, int | float) and not isinstance(item, bool) and not math.isnan(item)
            for item in value
        )
    )


def _check(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        shown = json.dumps(value, ensure_ascii=False)
        raise ValueError(f"`{name}` is {shown[:60]}, but it must be {rule}")
