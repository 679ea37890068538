"""The chunks of a streamed answer in OpenAI's form, turned into events; what has another form is passed over.

A server may leave out, add or mistype anything: each value is used only where it is what it should be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from glmtune.inference.requests.chat import (
    AnswerEvent,
    CallDelta,
    CallStart,
    Finished,
    TextDelta,
    ThoughtDelta,
)

REASONS = {"length": "length", "tool_calls": "tool_calls", "function_call": "tool_calls"}
"""What is said at the end, and what it means; all else is a stop."""
MAX_CALLS = 64
"""Of one answer; a server that goes on counting is not followed."""


class ChunkReader:
    """Reads the chunks of one answer.

    Attributes:
        has_ended: whether a chunk said that it is the last one.
    """

    def __init__(self) -> None:
        """Begin."""
        self.has_ended = False
        self._reason = "stop"
        self._places: dict[int, int] = {}
        self._usage: Mapping[str, Any] = {}

    def chunk(self, content: object) -> Iterator[AnswerEvent]:
        """Yield the events of one chunk."""
        yield from self._read(content, "delta")

    def whole(self, content: object) -> Iterator[AnswerEvent]:
        """Yield the events of an answer in one piece: some servers do not stream."""
        yield from self._read(content, "message")
        yield self.finished()

    def finished(self) -> Finished:
        """Return the last event."""
        details = _object(self._usage.get("prompt_tokens_details"))
        return Finished(
            REASONS.get(self._reason, "stop"),  # pyright: ignore[reportArgumentType]
            _number(self._usage.get("prompt_tokens")),
            _number(self._usage.get("completion_tokens")),
            _number(details.get("cached_tokens")),
            is_tuned={"on": True, "off": False}.get(str(self._usage.get("switch"))),
        )

    def _read(self, content: object, part: str) -> Iterator[AnswerEvent]:
        chunk = _object(content)
        self._usage = _object(chunk.get("usage")) or self._usage
        choices = chunk.get("choices")
        choice = _object(choices[0]) if isinstance(choices, list) and choices else {}
        message = _object(choice.get(part))
        # DeepSeek and vLLM name thoughts so, and vLLM's newer versions `reasoning`.
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        if isinstance(thoughts, str) and thoughts:
            yield ThoughtDelta(thoughts)
        text = message.get("content")
        if isinstance(text, str) and text:
            yield TextDelta(text)
        calls = message.get("tool_calls")
        for place, call in enumerate(calls if isinstance(calls, list) else ()):
            index = _object(call).get("index", place)
            function = _object(_object(call).get("function"))
            yield from self._call(index if isinstance(index, int) else place, function)
        if old := _object(message.get("function_call")):  # the form before tools, of ChatGLM3's own server
            yield from self._call(0, old)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self._reason, self.has_ended = reason, True

    def _call(self, index: int, function: Mapping[str, Any]) -> Iterator[AnswerEvent]:
        name, arguments = function.get("name"), function.get("arguments")
        if index not in self._places:
            if not isinstance(name, str) or not name or len(self._places) >= MAX_CALLS:
                return
            self._places[index] = len(self._places)
            yield CallStart(self._places[index], name)
        if isinstance(arguments, str) and arguments:
            yield CallDelta(self._places[index], arguments)


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
