"""Answers as a script has them, and a chat in the terminal that is given them: `python -m` this module."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from glmtune.errors import GlmtuneError
from glmtune.inference.requests.chat import AnswerEvent, CallDelta, CallStart, Finished, TextDelta
from glmtune.inference.requests.sampling import Sampling
from glmtune.interactive.answerer import AdapterChoice, AnswerStream, SamplingChoice

HOLD = object()
"""In a script: nothing more comes until somebody stops the answer."""
STOP = object()
"""In a script: the user presses Ctrl-C here."""


def said(text: str) -> list[AnswerEvent]:
    return [TextDelta(text), Finished("stop", 1, len(text))]


def called(name: str, arguments: str = "{}") -> list[AnswerEvent]:
    return [CallStart(0, name), CallDelta(0, arguments), Finished("tool_calls", 1, 1)]


class ScriptedAnswerer:
    """Gives one answer of a script after the other.

    Attributes:
        asked: what each was asked with.
        cancelled: how many were cancelled.
    """

    model_name = "scripted"

    def __init__(
        self, answers: Sequence[Sequence[Any]], *, adapters: Sequence[AdapterChoice] = (), tools: bool = True
    ) -> None:
        self._answers = list(answers)
        self.adapters, self.knows_tools = adapters, tools
        self.sampling_defaults = Sampling(temperature=0.8, top_p=0.8)
        self.asked: list[dict[str, Any]] = []
        self.cancelled = 0

    def answer(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        sampling: SamplingChoice,
        adapter: str = "",
        strength: float = 1.0,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> AnswerStream:
        options = {"sampling": sampling, "adapter": adapter, "strength": strength, "tools": tools}
        self.asked.append({"messages": list(messages), **options})
        script = self._answers.pop(0) if self._answers else said("nothing is left")
        if isinstance(script, GlmtuneError):
            raise script
        stream = AnswerStream(self._cancel)
        for event in script:
            if event is STOP:
                stream.stop()
            elif event is not HOLD:
                stream.put(event)
        return stream

    def _cancel(self) -> None:
        self.cancelled += 1

    def close(self) -> None:
        pass


HOSTILE = "你好\x1b]0;title\x07\x1b[2J[bold]red[/bold] \x9b31m\u202eabc\x00 :smile:"


def main() -> None:
    """Run the loop of `glmtune chat` on answers that a model should never give."""
    from glmtune.interactive.terminal_chat.display import Display
    from glmtune.interactive.terminal_chat.keyboard import Keyboard
    from glmtune.interactive.terminal_chat.loop import TerminalChat
    from glmtune.interactive.terminal_chat.session import Session

    answers = [
        said(HOSTILE),
        [TextDelta("第一"), HOLD],
        [HOLD],
        called("look\x1b[31m", '{"a": "\x9b5m"}'),
        said("end"),
    ]
    session = Session(ScriptedAnswerer(answers))
    TerminalChat(session, Keyboard(session), Display()).run()


if __name__ == "__main__":
    sys.exit(main())
