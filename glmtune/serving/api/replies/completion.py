"""Replies of ``/v1/completions``: one object, or the chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from glmtune.inference.requests.chat import AnswerEvent, Finished, TextDelta
from glmtune.inference.requests.request import TokenLogprob
from glmtune.serving.api.replies.chat import Json, ReplyHead
from glmtune.serving.api.replies.logprobs import LegacyLogprobs
from glmtune.serving.api.replies.tokens import TokenTexts
from glmtune.serving.api.replies.usage import UsageCount

KIND = "text_completion"


class ScoresPrompt(Protocol):
    """What knows how likely the tokens of a prompt are."""

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Of the prompt's tokens; None where they were not asked for."""
        ...


class TextChoice:
    """The text of one continuation: what it begins with, then what comes.

    Attributes:
        index: of the choice.
    """

    def __init__(self, index: int, echo: str, prompt: ScoresPrompt, texts: TokenTexts | None) -> None:
        """Start before the prompt.

        Args:
            index: of the choice.
            echo: the prompt, where the text begins with it.
            prompt: tells its log-probabilities, once it was read.
            texts: writes log-probabilities; None leaves them out.
        """
        self.index = index
        self._echo, self._prompt = echo, prompt
        self._logprobs = None if texts is None else LegacyLogprobs(texts)
        self._is_begun = False

    def take(self, event: AnswerEvent) -> tuple[str, Json | None]:
        """Return the text that an event adds, and its log-probabilities; the first adds the prompt."""
        text, entries = (event.text, event.logprobs) if isinstance(event, TextDelta) else ("", ())
        if not self._is_begun:
            self._is_begun = True
            text = self._echo + text
            entries = (*(self._prompt.prompt_logprobs or ()), *entries)
        told = self._logprobs.json(entries) if self._logprobs is not None and entries else None
        return text, told


class CompletionChunks:
    """Turns events into the chunks of a stream."""

    def __init__(self, head: ReplyHead, choices: Sequence[TextChoice]) -> None:
        """Start before the first chunk."""
        self._head, self._choices = head, choices
        self._usage = UsageCount(head.answers_per_prompt)

    def opening(self) -> list[Json]:
        """Return nothing: a text has no speaker."""
        return []

    def chunks(self, index: int, event: AnswerEvent) -> list[Json]:
        """Return the chunks of an event."""
        text, logprobs = self._choices[index].take(event)
        found = [self._chunk(index, text, logprobs, None)] if text or logprobs else []
        if isinstance(event, Finished):
            self._usage.add(index, event)
            found.append(self._chunk(index, "", None, event.reason))
        return found

    def closing(self) -> list[Json]:
        """Return the chunk that counts tokens, where it was asked for."""
        return [self._head.json(KIND, []) | {"usage": self._usage.json}] if self._head.has_usage_chunk else []

    def _chunk(self, index: int, text: str, logprobs: Json | None, finish: str | None) -> Json:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return self._head.json(KIND, [choice]) | ({"usage": None} if self._head.has_usage_chunk else {})


class CompletionReply:
    """Gathers the events of all continuations to one object."""

    def __init__(self, head: ReplyHead, choices: Sequence[TextChoice]) -> None:
        """Start empty."""
        self._head, self._choices = head, choices
        self._texts = [""] * len(choices)
        self._logprobs: list[dict[str, list[Any]]] = [
            {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []} for _ in choices
        ]
        self._finished: dict[int, Finished] = {}

    def add(self, index: int, event: AnswerEvent) -> None:
        """Take the next event of a continuation."""
        text, logprobs = self._choices[index].take(event)
        self._texts[index] += text
        for name, values in (logprobs or {}).items():
            self._logprobs[index][name] += values
        if isinstance(event, Finished):
            self._finished[index] = event

    def json(self) -> Json:
        """Return the reply."""
        usage = UsageCount(self._head.answers_per_prompt)
        choices: list[Json] = []
        for index, text in enumerate(self._texts):
            usage.add(index, self._finished[index])
            logprobs = self._logprobs[index] if self._head.has_logprobs else None
            reason = self._finished[index].reason
            choices.append({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
        return self._head.json(KIND, choices) | {"usage": usage.json}
