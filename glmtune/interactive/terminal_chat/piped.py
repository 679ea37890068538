"""A chat without a terminal: every line is a question, and nothing but the answers is written.

``echo 你好 | glmtune chat`` answers once; a file of several lines is one conversation. A backslash at the end
joins a line with the next one. There are no commands: a pipe holds questions, whatever they begin with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator

from glmtune.inference.requests.chat import TextDelta
from glmtune.interactive.conversation import AnswerParts
from glmtune.interactive.terminal_chat.commands import goes_on
from glmtune.interactive.terminal_chat.session import Session
from glmtune.terminal.text import write_now


def questions(lines: Iterable[str]) -> Iterator[str]:
    r"""Yield the questions of a text: its lines, empty ones left out.

    >>> list(questions(["one\n", "\n", "two \\\n", "lines"]))
    ['one', 'two \nlines']
    """
    parts: list[str] = []
    for line in lines:
        text = line.rstrip("\r\n")
        parts.append(text[:-1] if goes_on(text) else text)
        if goes_on(text):
            continue
        if question := "\n".join(parts).strip():
            yield question
        parts = []
    if question := "\n".join(parts).strip():
        yield question


def standard_input() -> Iterator[str]:
    """Yield the lines of standard input as they come; bytes that are no UTF-8 are shown as such."""
    for line in sys.stdin.buffer:
        yield line.decode("utf-8-sig", "replace")


def run_piped(session: Session, lines: Iterable[str]) -> None:
    """Answer every line.

    Raises:
        GlmtuneError: a question cannot be answered; the answers before it were written.
        BrokenPipeError: nobody reads the answers any more.
    """
    conversation = session.conversation
    for question in questions(lines):
        conversation.ask(question)
        parts = AnswerParts()
        for event in session.ask():
            parts.add(event)
            if isinstance(event, TextDelta):
                write_now(event.text)
        calls = [{"name": call.name, "arguments": call.arguments} for call in parts.calls]
        if calls:  # nobody is there who could be asked for a result
            write_now(("\n" if parts.text else "") + json.dumps({"tool_calls": calls}, ensure_ascii=False))
        write_now("\n")
        conversation.add_answer(parts)
