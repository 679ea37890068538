r"""Text and calls of tools in what ChatGLM3, GLM-4 and folders in transformers' format write, as it comes.

Messages are separated by the name of a role, and the first line of each says whether it calls a tool::

    "\n 今天晴。"                                  text: the first line is empty
    "get_weather\n{\"city\": \"北京\"}"            GLM-4 calls a tool
    " get_weather\n ```python\ntool_call(city='北京')\n```"      ChatGLM3 does
    "Hello\nWorld"                                 text: what follows the first line is no call

A first line is held back only while it can still be the name of a tool, and only where tools were offered;
without any, all is text, also what looks like a call. (`model.chat` makes a dictionary of every answer with
a first line, whether tools were offered or not: fine to look at, but a stream cannot take text back.)

The models of folders in transformers' format write calls as GLM-4 does, and some think first; their thoughts
are parted from the answer before anything else::

    "<think>今天…</think>\n今天晴。"                 thoughts, then text

JSON is handed on as it comes. Python is read once it is complete: as literals, never evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from glmtune.inference.requests.answer_events import CallDelta, CallStart, TextDelta, ThoughtDelta
from glmtune.models.releases.families import Family
from glmtune.models.templates.responses import ASSISTANT, CALL_NAME, read_python_parameters
from glmtune.models.templates.streamed_responses import ThoughtSplit, cleaner_of, overlap

Delta = ThoughtDelta | TextDelta | CallStart | CallDelta
Kind = Literal["text", "json", "python"]

_FENCE, _CALL = "```", "tool_call("
MAX_FENCE_CHARS = 24
"""Longest first line of a fenced block: its marks and the name of a language."""
MAX_CUT_TRIES = 32
"""Commas, from the end, at which the arguments of a call that was cut may be complete."""


class AnswerReader:
    """Turns the text of an answer, with its role names, into deltas."""

    def __init__(
        self,
        family: Family,
        *,
        has_tools: bool,
        goes_on: bool = False,
        call: str = "",
        opening: str = "",
    ) -> None:
        """Start an answer.

        Args:
            family: ChatGLM3, GLM-4, or a folder in transformers' format.
            has_tools: tools were offered.
            goes_on: the beginning of the answer stands in the prompt; what follows is text.
            call: name of the tool whose call the prompt has begun.
            opening: the tag of thoughts, where the prompt ends with it.
        """
        may_think = family is Family.TRANSFORMERS and not goes_on and not call
        self._thoughts = ThoughtSplit() if may_think else None
        if self._thoughts is not None:
            self._thoughts.feed(opening)
        self._family, self._has_tools = family, has_tools
        self._held = ""  # may be the beginning of a role's name
        self._num_calls = 0
        self._has_text = False  # of an earlier message
        self._message = _Message(family, decides=has_tools and not goes_on, goes_on=goes_on, call=call)

    def feed(self, text: str) -> list[Delta]:
        """Take more text; return what is certain now."""
        if self._thoughts is None:
            return self._answer(text)
        thoughts, text = self._thoughts.feed(text)
        deltas: list[Delta] = [ThoughtDelta(thoughts)] if thoughts else []
        return deltas + (self._answer(text) if text else [])

    def _answer(self, text: str) -> list[Delta]:
        """Take more text behind the thoughts."""
        *complete, last = (self._held + text).split(ASSISTANT)
        deltas: list[Delta] = []
        for part in complete:
            deltas += self._numbered(self._message.feed(part) + self._message.finish(is_cut=False))
            self._message = _Message(self._family, decides=self._has_tools)
        num_held = overlap(last, ASSISTANT)
        self._held = last[len(last) - num_held :]
        return deltas + self._numbered(self._message.feed(last[: len(last) - num_held]))

    def finish(self, *, is_cut: bool) -> list[Delta]:
        """Return the rest.

        Args:
            is_cut: the model did not end the answer itself.
        """
        deltas: list[Delta] = []
        if self._thoughts is not None:
            thoughts, text = self._thoughts.finish()
            deltas = [ThoughtDelta(thoughts)] if thoughts else self._answer(text)
        rest, self._held = self._held, ""
        return deltas + self._numbered(self._message.feed(rest) + self._message.finish(is_cut=is_cut))

    def _numbered(self, deltas: list[Delta]) -> list[Delta]:
        """Count calls over all messages, and part the texts of messages by a line break."""
        numbered: list[Delta] = []
        for delta in deltas:
            if isinstance(delta, TextDelta):
                if self._has_text and not self._message.has_text:
                    delta = TextDelta(f"\n{delta.text}")
                self._message.has_text = self._has_text = True
            elif isinstance(delta, CallStart):
                delta = CallStart(self._num_calls, delta.name)
                self._num_calls += 1
            elif isinstance(delta, CallDelta):
                delta = CallDelta(self._num_calls - 1, delta.arguments)
            numbered.append(delta)
        return numbered


class _Message:
    """One message: undecided at first, then text, or a call in JSON or Python."""

    def __init__(self, family: Family, *, decides: bool, goes_on: bool = False, call: str = "") -> None:
        self.has_text = False
        self._family = family
        self._kind: Kind | None = None if decides or call else "text"
        self._line = f"{call}\n" if call else ""  # of the prompt, in front of what the model writes
        self._waiting = ""  # what is undecided, or a call in Python
        self._cleaner = cleaner_of(family, goes_on=goes_on)
        self._object = JsonObject()

    def feed(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._kind is None:
            self._waiting += text
            self._kind = kind_of(self._family, self._line + self._waiting)
            if self._kind is None:
                return []
            text, self._waiting = self._waiting, ""
            if self._kind == "json":
                name, _, text = (self._line + text).partition("\n")
                return [CallStart(0, name.strip()), *self._arguments(text.lstrip())]
        if self._kind == "text":
            return _text(self._cleaner.feed(text))
        if self._kind == "json":
            return self._arguments(text)
        self._waiting += text
        return []

    def finish(self, *, is_cut: bool) -> list[Delta]:
        waiting, self._waiting = self._waiting, ""
        if self._kind == "python":
            name, _, content = (self._line + waiting).partition("\n")
            arguments = python_arguments(content, is_cut=is_cut)
            if arguments is not None:
                return [CallStart(0, name.strip()), CallDelta(0, arguments)]
        return _text(self._cleaner.feed(waiting) + self._cleaner.finish())

    def _arguments(self, text: str) -> list[Delta]:
        inside = self._object.feed(text)
        return [CallDelta(0, inside)] if inside else []


def _text(text: str) -> list[Delta]:
    return [TextDelta(text)] if text else []


def kind_of(family: Family, begun: str) -> Kind | None:
    r"""Say what a message is by its beginning, None while it may still be one thing or the other.

    >>> kind_of(Family.GLM4, "clock\n{"), kind_of(Family.GLM4, "Good morn"), kind_of(Family.GLM4, "clock")
    ('json', 'text', None)
    """
    line, line_break, content = begun.partition("\n")
    if not line_break:
        return None if not line.strip() or CALL_NAME.fullmatch(line.strip()) else "text"
    if not CALL_NAME.fullmatch(line.strip()):
        return "text"
    content = content.lstrip()
    if family in (Family.GLM4, Family.TRANSFORMERS):
        return None if not content else "json" if content.startswith("{") else "text"
    fence, line_break, code = content.partition("\n")
    if len(fence) > MAX_FENCE_CHARS or not fence.startswith(_FENCE[: len(content)]):
        return "text"
    code = code.lstrip()
    if code.startswith(_CALL):
        return "python"
    return None if _CALL.startswith(code) else "text"


class JsonObject:
    """Follows an object of JSON to the brace that closes it; what stands behind is no part of it."""

    def __init__(self) -> None:
        """Start in front of its first brace."""
        self._depth = 0
        self._is_in_text = self._is_escaped = self._is_over = False

    def feed(self, text: str) -> str:
        """Return what of the text belongs to the object."""
        if self._is_over:
            return ""
        for place, character in enumerate(text):
            if self._is_in_text:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._is_in_text = False
            elif character == '"':
                self._is_in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._is_over = True
                    return text[: place + 1]
        return text


def python_arguments(content: str, *, is_cut: bool) -> str | None:
    r"""Return the arguments of a call that ChatGLM3 wrote as JSON.

    Args:
        content: a fenced block with one call of Python.
        is_cut: the end may be missing: then the arguments that are complete, and no closing brace.

    Returns:
        None where it is no call with plain values.

    >>> python_arguments("```python\ntool_call(city='北京', days=3)\n```", is_cut=False)
    '{"city": "北京", "days": 3}'
    """
    block = content.strip()
    whole = block if block.endswith(_FENCE) and "\n" in block.removesuffix(_FENCE) else f"{block}\n{_FENCE}"
    arguments = _json_object(read_python_parameters(whole))
    if arguments is not None or not is_cut:
        return arguments
    code = block.partition("\n")[2]
    place = len(code)
    for _ in range(MAX_CUT_TRIES):
        arguments = _json_object(read_python_parameters(f"{_FENCE}\n{code[:place]})\n{_FENCE}"))
        if arguments is not None:
            return arguments.removesuffix("}")
        place = code.rfind(",", 0, place)
        if place < 0:
            break
    return "{"


def _json_object(values: Mapping[str, Any] | None) -> str | None:
    """Return plain values as JSON; None where there are none, or JSON has no such value (a set, infinity)."""
    if values is None:
        return None
    try:
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which no reply can carry as it is
        return json.dumps(values)
    except (TypeError, ValueError, RecursionError):
        return None
    return text
