"""Replies of ``/v1/chat/completions``: one object, or the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from glmtune.inference.requests.chat import (
    AnswerEvent,
    CallDelta,
    CallStart,
    Finished,
    TextDelta,
    ThoughtDelta,
)
from glmtune.inference.requests.request import TokenLogprob
from glmtune.serving.api.replies.logprobs import chat_logprobs
from glmtune.serving.api.replies.tokens import TokenTexts
from glmtune.serving.api.replies.usage import UsageCount

Json = dict[str, Any]
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def new_id(prefix: str, length: int) -> str:
    """Return an id that nobody else has."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(length))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyHead:
    """What a reply and all its chunks have in common.

    Attributes:
        id: of the reply.
        model: the name asked for.
        fingerprint: see `ServingState`.
        created: in seconds since 1970.
        num_choices: how many answers.
        answers_per_prompt: how many of them belong to one prompt.
        has_logprobs: whether log-probabilities are told.
        has_usage_chunk: whether a stream ends with a count of tokens.
    """

    id: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    num_choices: int = 1
    answers_per_prompt: int = 1
    has_logprobs: bool = False
    has_usage_chunk: bool = False

    def json(self, kind: str, choices: list[Json]) -> Json:
        """Return the object around choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


class ChatChunks:
    """Turns events into the chunks of a stream."""

    def __init__(self, head: ReplyHead, texts: TokenTexts) -> None:
        """Start before the first chunk."""
        self._head, self._texts = head, texts
        self._usage = UsageCount(head.answers_per_prompt)

    def opening(self) -> list[Json]:
        """Return the chunks that say who speaks, one for each answer."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta) for index in range(self._head.num_choices)]

    def chunks(self, index: int, event: AnswerEvent) -> list[Json]:
        """Return the chunks of an event."""
        match event:
            case ThoughtDelta():
                # As DeepSeek and vLLM name it; OpenAI's own interface hides what its models think.
                return [self._chunk(index, {"reasoning_content": event.thoughts}, logprobs=event.logprobs)]
            case TextDelta():
                if not event.text and not event.logprobs:
                    return []
                return [self._chunk(index, {"content": event.text}, logprobs=event.logprobs)]
            case CallStart():
                function = {"name": event.name, "arguments": ""}
                call = {
                    "index": event.index,
                    "id": new_id("call_", 24),
                    "type": "function",
                    "function": function,
                }
                return [self._chunk(index, {"tool_calls": [call]})]
            case CallDelta():
                # Without id and name: clients join what carries an index, and an id would begin another call.
                call = {"index": event.index, "function": {"arguments": event.arguments}}
                return [self._chunk(index, {"tool_calls": [call]}, logprobs=event.logprobs)]
            case Finished():
                self._usage.add(index, event)
                return [self._chunk(index, {}, finish=event.reason)]

    def closing(self) -> list[Json]:
        """Return the chunk that counts tokens, where it was asked for."""
        if not self._head.has_usage_chunk:
            return []
        return [self._head.json("chat.completion.chunk", []) | {"usage": self._usage.json}]

    def _chunk(
        self, index: int, delta: Json, *, finish: str | None = None, logprobs: tuple[TokenLogprob, ...] = ()
    ) -> Json:
        told = chat_logprobs(logprobs, self._texts) if self._head.has_logprobs and logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}
        chunk = self._head.json("chat.completion.chunk", [choice])
        return chunk | ({"usage": None} if self._head.has_usage_chunk else {})


class ChatChoice:
    """Gathers the events of one answer.

    Attributes:
        text: all of it.
        thoughts: what came before it; empty: nothing.
        calls: name and arguments of each tool call.
        finished: how it ended, once it did.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.text = self.thoughts = ""
        self.calls: list[tuple[str, str]] = []
        self.finished: Finished | None = None
        self.logprobs: list[TokenLogprob] = []

    def add(self, event: AnswerEvent) -> None:
        """Take the next event."""
        match event:
            case ThoughtDelta():
                self.thoughts += event.thoughts
                self.logprobs += event.logprobs
            case TextDelta():
                self.text += event.text
                self.logprobs += event.logprobs
            case CallStart():
                self.calls.append((event.name, ""))
            case CallDelta():
                name, arguments = self.calls[event.index]
                self.calls[event.index] = (name, arguments + event.arguments)
                self.logprobs += event.logprobs
            case Finished():
                self.finished = event

    def json(self, index: int, texts: TokenTexts | None) -> Json:
        """Return the choice; ``texts`` writes log-probabilities, None leaves them out."""
        assert self.finished is not None, "a reply is written once all its answers have ended"
        calls = [
            {
                "id": new_id("call_", 24),
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for name, arguments in self.calls
        ]
        message: Json = {
            "role": "assistant",
            "content": None if calls and not self.text else self.text,
            "refusal": None,
        } | ({"reasoning_content": self.thoughts} if self.thoughts else {})
        return {
            "index": index,
            "message": message | ({"tool_calls": calls} if calls else {}),
            "logprobs": None if texts is None else chat_logprobs(self.logprobs, texts),
            "finish_reason": self.finished.reason,
        }


class ChatReply:
    """Gathers the events of all answers to one object."""

    def __init__(self, head: ReplyHead, texts: TokenTexts) -> None:
        """Start empty."""
        self._head, self._texts = head, texts
        self.choices = [ChatChoice() for _ in range(head.num_choices)]

    def add(self, index: int, event: AnswerEvent) -> None:
        """Take the next event of an answer."""
        self.choices[index].add(event)

    def json(self) -> Json:
        """Return the reply."""
        usage = UsageCount(self._head.answers_per_prompt)
        for index, choice in enumerate(self.choices):
            assert choice.finished is not None, "a reply is written once all its answers have ended"
            usage.add(index, choice.finished)
        texts = self._texts if self._head.has_logprobs else None
        choices = [choice.json(index, texts) for index, choice in enumerate(self.choices)]
        return self._head.json("chat.completion", choices) | {"usage": usage.json}
