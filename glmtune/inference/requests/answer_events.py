"""What happens while an answer is written: thoughts, text, calls of tools, the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glmtune.inference.requests.request import TokenLogprob


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of the answer, cleaned as the release cleans it.

    ``logprobs`` are of the tokens since the last event that had some, held-back ones included: over an answer
    there is one entry per token, so a text may be empty.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ThoughtDelta:
    """More of what the model thinks before its answer, without the tags around it; no part of the answer."""

    thoughts: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class CallStart:
    """The model begins to call a tool; ``index`` counts the calls of the answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """More of a call's arguments; the joined pieces are a JSON object (cut, where the answer was cut).

    GLM-4 writes JSON itself, and what it writes is handed on: an object that it does not close, or writes
    wrongly, comes as it is.
    """

    index: int
    arguments: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is over.

    Attributes:
        reason: ``stop``, ``length``, ``tool_calls``, ``cancelled`` or ``failed``.
        num_prompt_tokens: length of the prompt.
        num_new_tokens: tokens generated, the one that ended the answer included.
        num_cached_tokens: tokens of the prompt that were not read again.
        error: what went wrong, where it failed.
        raw: the model's own words, for the history of a release whose messages carry more than text; with
            the tag of thoughts in front where the prompt opened them.
        is_tuned: whether the adapter applied, where its switch decided that; None: none did.
    """

    reason: Literal["stop", "length", "tool_calls", "cancelled", "failed"]
    num_prompt_tokens: int
    num_new_tokens: int
    num_cached_tokens: int = 0
    error: str = ""
    raw: str = ""
    is_tuned: bool | None = None


AnswerEvent = ThoughtDelta | TextDelta | CallStart | CallDelta | Finished
