r"""The state of a conversation: messages in OpenAI's form, and what can be done to them between two answers.

Terminal and web page keep one `Conversation` per user; what it holds is plain data, so it can be copied,
pickled and saved. While an answer comes in, `AnswerParts` gathers its events; only then is it added.

    {"role": "user", "content": "北京天气怎么样？"}
    {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", "type": "function",
        "function": {"name": "get_weather", "arguments": "{\"city\": \"北京\"}"}}]}
    {"role": "tool", "tool_call_id": "call_1", "content": "晴，23 度"}
    {"role": "assistant", "content": "北京今天晴。"}
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmtune.errors import ConfigError, DataError, GlmtuneError
from glmtune.inference.requests.chat import (
    AnswerEvent,
    CallDelta,
    CallStart,
    Finished,
    TextDelta,
    ThoughtDelta,
)
from glmtune.storage.files import write_text
from glmtune.storage.json_files import parse_json

ROLES = ("system", "user", "assistant", "tool")
MAX_FILE_BYTES = 64 * 2**20
"""Of a saved conversation: far above any context, far below what a mistaken file name may be."""

Turn = dict[str, Any]
"""One message in OpenAI's form."""


@dataclass(slots=True)
class Call:
    """A tool that the model calls.

    Attributes:
        name: of the tool, in the model's words.
        arguments: JSON, in the model's words; cut where the answer was.
        id: which the result refers to; empty until the answer stands in a conversation.
    """

    name: str
    arguments: str = ""
    id: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether the arguments are a JSON object, as every template needs them."""
        try:
            return isinstance(parse_json((self.arguments or "{}").encode()), dict)
        except ValueError:
            return False


@dataclass(slots=True)
class AnswerParts:
    """What came of an answer so far.

    Attributes:
        text: all of it.
        thoughts: what the model thought before it; shown, and no part of the conversation.
        calls: of tools, in their order.
        finished: how it ended; None while it is being written, or where nobody waited for the end.
    """

    text: str = ""
    calls: list[Call] = field(default_factory=list)
    finished: Finished | None = None
    thoughts: str = ""

    def add(self, event: AnswerEvent) -> None:
        """Take the next event."""
        match event:
            case ThoughtDelta():
                self.thoughts += event.thoughts
            case TextDelta():
                self.text += event.text
            case CallStart():
                self.calls.append(Call(event.name))
            case CallDelta():
                self.calls[event.index].arguments += event.arguments
            case Finished():
                self.finished = event

    @property
    def whole_calls(self) -> list[Call]:
        """The calls that can be answered; one that was cut inside its arguments cannot."""
        return [call for call in self.calls if call.is_whole]


class Conversation:
    """Messages, and what a user does to them.

    Attributes:
        system: text in front of everything; empty: none.
        turns: all other messages, oldest first.
    """

    def __init__(self, system: str = "", turns: Sequence[Turn] = ()) -> None:
        """Begin with a system prompt, or with messages that were there before."""
        self.system = system
        self.turns: list[Turn] = list(turns)

    @property
    def messages(self) -> list[Turn]:
        """All messages, the system prompt in front, as a model is asked with; a copy."""
        first: list[Turn] = [{"role": "system", "content": self.system}] if self.system else []
        return copy.deepcopy(first + self.turns)

    @property
    def is_waiting(self) -> bool:
        """Whether the last message is to be answered."""
        return bool(self.turns) and self.turns[-1]["role"] != "assistant" and not self.open_calls

    @property
    def open_calls(self) -> list[Call]:
        """The calls of the last answer whose results are missing."""
        for num_results, turn in enumerate(reversed(self.turns)):
            if turn["role"] != "tool":
                return (_calls(turn) if turn["role"] == "assistant" else [])[num_results:]
        return []

    # Adding.

    def ask(self, question: str) -> None:
        """Add a question.

        A call that was given no result is left out from here on: servers refuse a conversation with one.
        """
        left_out = {call.id for call in self.open_calls}
        if left_out:
            place = max(place for place, turn in enumerate(self.turns) if turn["role"] == "assistant")
            turn = self.turns[place]
            kept = [call for call in turn["tool_calls"] if call.get("id", "") not in left_out]
            turn = {key: value for key, value in turn.items() if key != "tool_calls"}
            if kept:
                turn["tool_calls"] = kept
            self.turns[place : place + 1] = [turn] if kept or turn["content"] else []
        self.turns.append({"role": "user", "content": question})

    def add_answer(self, answer: AnswerParts) -> bool:
        """Add what came of an answer, also of one that was stopped.

        Args:
            answer: its parts; a call that was cut inside its arguments is left out.

        Returns:
            False where nothing came that can stand in a conversation: the question or result that was to be
            answered is then taken back, as most templates know no question without an answer.
        """
        calls = answer.whole_calls
        is_stopped = answer.finished is None or answer.finished.reason in ("cancelled", "failed")
        if not answer.text and not calls and (is_stopped or answer.calls):
            self.turns.pop()
            return False
        turn: Turn = {"role": "assistant", "content": answer.text}
        if calls:
            taken = {call.id for turn in self.turns for call in _calls(turn)}
            free = (name for number in itertools.count(1) if (name := f"call_{number}") not in taken)
            turn["tool_calls"] = [_call_turn(call, name) for call, name in zip(calls, free, strict=False)]
        self.turns.append(turn)
        return True

    def add_tool_result(self, result: str) -> None:
        """Add the result of the first open call.

        Raises:
            GlmtuneError: no call is open.
        """
        if not self.open_calls:
            raise GlmtuneError("No tool was called, so there is no place for a result. Ask a question.")
        self.turns.append({"role": "tool", "tool_call_id": self.open_calls[0].id, "content": result})

    # Changing.

    def edit(self, place: int, question: str) -> None:
        """Put another question in the place of one; all that followed it goes.

        Args:
            place: its index in ``turns``.
            question: the new text.

        Raises:
            GlmtuneError: no question stands there.
        """
        if not 0 <= place < len(self.turns) or self.turns[place]["role"] != "user":
            raise GlmtuneError(f"Message {place + 1} is no question, and only questions can be edited.")
        self.turns[place:] = [{"role": "user", "content": question}]

    def regenerate(self, place: int | None = None) -> None:
        """Take an answer back, so that it can be written anew, with all that followed it.

        Args:
            place: its index in ``turns``; None: the last answer.

        Raises:
            GlmtuneError: no answer stands there.
        """
        place = len(self.turns) - 1 if place is None else place
        if not 0 < place < len(self.turns) or self.turns[place]["role"] != "assistant":
            raise GlmtuneError("There is no answer to write anew. Ask a question.")
        while self.turns[place - 1]["role"] == "assistant":  # of a conversation that was loaded
            place -= 1
        del self.turns[place:]

    def undo(self) -> str:
        """Remove the last question with all that answers it, and return its text.

        Raises:
            GlmtuneError: there is none.
        """
        place = self.last_question
        if place is None:
            raise GlmtuneError("The conversation holds no question, so there is nothing to take back.")
        question = str(self.turns[place]["content"])
        del self.turns[place:]
        return question

    @property
    def last_question(self) -> int | None:
        """Index of the last question in ``turns``."""
        places = [place for place, turn in enumerate(self.turns) if turn["role"] == "user"]
        return places[-1] if places else None

    def clear(self) -> None:
        """Forget all messages; the system prompt stays."""
        self.turns.clear()

    # Keeping.

    def to_json(self) -> str:
        """Return the conversation as JSON: one object with ``messages``, a row that `glmtune train` reads."""
        return json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Conversation:
        """Read what `to_json` wrote, or a bare list of messages.

        Raises:
            DataError: it is none, with the place.
        """
        try:
            content = parse_json(text.encode() if isinstance(text, str) else text)
        except ValueError as error:
            raise DataError(f"It is no valid JSON ({error}).") from None
        items = content.get("messages") if isinstance(content, dict) else content
        if not isinstance(items, list):
            raise DataError('It must hold a list of messages, or an object with one: `{"messages": [...]}`.')
        turns = [_read_turn(item, f"Message {number}") for number, item in enumerate(items, start=1)]
        has_system = bool(turns) and turns[0]["role"] == "system"
        return cls(turns[0]["content"] if has_system else "", turns[has_system:])

    def save(self, path: str | Path) -> Path:
        """Write a file, whole or not at all, and return its place.

        Raises:
            ConfigError: it cannot be written.
        """
        file = Path(path).expanduser()
        try:
            write_text(file, self.to_json())
        except OSError as error:
            raise ConfigError(
                f"`{file}` cannot be written ({error.strerror or error}). Choose another place."
            ) from None
        return file

    @classmethod
    def load(cls, path: str | Path) -> Conversation:
        """Read a file.

        Raises:
            ConfigError: it cannot be read.
            DataError: it holds no conversation.
        """
        file = Path(path).expanduser()
        try:
            with file.open("rb") as stream:
                content = stream.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ConfigError(
                f"`{file}` cannot be read ({error.strerror or error}). Give the file of a saved conversation."
            ) from None
        if len(content) > MAX_FILE_BYTES:
            raise DataError(f"It is larger than {MAX_FILE_BYTES >> 20} MiB: no conversation.", path=file)
        try:
            return cls.from_json(content)
        except DataError as error:
            raise DataError(str(error), path=file) from None


def _call_turn(call: Call, call_id: str) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments or "{}"}
    return {"id": call_id, "type": "function", "function": function}


def _calls(turn: Turn) -> list[Call]:
    return [
        Call(call["function"]["name"], call["function"]["arguments"], call["id"])
        for call in turn.get("tool_calls", ())
    ]


def _read_turn(item: object, place: str) -> Turn:
    """Check a message of a file: what a template cannot show would fail in the middle of a chat."""
    if not isinstance(item, Mapping):
        raise DataError(f"{place} is a {type(item).__name__}, but it must be an object with `role`.")
    role = {"observation": "tool"}.get(str(item.get("role")), item.get("role"))
    if role not in ROLES:
        raise DataError(f"{place} has the role {str(role)[:40]!r}, but it must be one of {', '.join(ROLES)}.")
    content = item.get("content")
    content = "" if content is None and item.get("tool_calls") else content
    if not isinstance(content, str):
        raise DataError(f"{place}: `content` is a {type(content).__name__}, but it must be text.")
    turn: Turn = {"role": role, "content": content}
    if role == "tool":
        turn["tool_call_id"] = str(item.get("tool_call_id") or "")
    calls = item.get("tool_calls") or ()
    if calls and (role != "assistant" or not isinstance(calls, list)):
        raise DataError(f"{place}: `tool_calls` must be a list, in a message of the assistant.")
    if calls:
        turn["tool_calls"] = [_read_call(call, f"{place}, call {n}") for n, call in enumerate(calls, start=1)]
    return turn


def _read_call(item: object, place: str) -> dict[str, Any]:
    function = item.get("function") if isinstance(item, Mapping) else None
    if not isinstance(item, Mapping) or not isinstance(function, Mapping):
        raise DataError(f"{place} must be an object with `id` and `function`.")
    name, arguments = function.get("name"), function.get("arguments", "{}")
    if not isinstance(name, str) or not name or not isinstance(arguments, str):
        raise DataError(f"{place}: `function` needs a `name`, and `arguments` as text.")
    if not Call(name, arguments).is_whole:
        raise DataError(f"{place}: `arguments` is {arguments[:40]!r}, but it must be a JSON object in text.")
    return _call_turn(Call(name, arguments), str(item.get("id") or ""))
