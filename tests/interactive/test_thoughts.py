"""Thoughts in a chat: shown apart from the answer, and no part of the conversation."""

from __future__ import annotations

import pytest

from glmtune.inference.requests.chat import Finished, TextDelta, ThoughtDelta
from glmtune.interactive.chunks import ChunkReader
from glmtune.interactive.conversation import AnswerParts, Conversation
from glmtune.interactive.terminal_chat.display import Display
from glmtune.interactive.terminal_chat.piped import run_piped
from glmtune.interactive.terminal_chat.session import Session
from glmtune.interactive.web.shown import shown, with_ending
from glmtune.interactive.web.words import CHINESE, ENGLISH
from glmtune.terminal.console import Console
from tests.interactive.scripted import ScriptedAnswerer

EVENTS = [
    ThoughtDelta("2 and "),
    ThoughtDelta("2 \x1b[2J"),
    TextDelta("Four"),
    TextDelta(" legs."),
    Finished("stop", 1, 0),
]


def parts_of(events: list) -> AnswerParts:
    parts = AnswerParts()
    for event in events:
        parts.add(event)
    return parts


def test_a_conversation_keeps_the_answer_alone() -> None:
    parts, talk = parts_of(EVENTS), Conversation()
    talk.ask("How many?")
    assert talk.add_answer(parts)
    assert parts.thoughts == "2 and 2 \x1b[2J"
    assert talk.messages == [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "Four legs."},
    ]


def test_a_terminal_shows_thoughts_dimmed_and_apart(capsys: pytest.CaptureFixture[str]) -> None:
    Display(Console(highlight=False, soft_wrap=True)).answer(iter(EVENTS), AnswerParts())
    assert capsys.readouterr().out == "2 and 2 \\u001b[2J\n\nFour legs.\n"
    Display(Console(force_terminal=True, highlight=False, soft_wrap=True)).answer(iter(EVENTS), AnswerParts())
    assert "\x1b[2m2 and \x1b[0m" in capsys.readouterr().out
    cut = [ThoughtDelta("2 and"), Finished("length", 1, 0)]
    Display(Console(highlight=False, soft_wrap=True)).answer(iter(cut), AnswerParts())
    assert capsys.readouterr().out.startswith("2 and\n")


def test_a_pipe_is_given_the_answer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    run_piped(Session(ScriptedAnswerer([EVENTS])), ["How many?"])
    assert capsys.readouterr().out == "Four legs.\n"


def test_a_page_shows_thoughts_above_the_answer_until_the_next() -> None:
    talk = Conversation(turns=[{"role": "user", "content": "How many?"}])
    writing = shown(talk, ENGLISH, parts_of(EVENTS[:1]))[-1]["content"]
    assert writing.startswith("> *Thoughts*\n> \n> 2 and")
    parts = parts_of([ThoughtDelta("a\n<b>"), *EVENTS[2:]])
    talk.add_answer(parts)
    ended = with_ending(shown(talk, CHINESE), parts, CHINESE)[-1]["content"]
    assert ended.startswith("> *思考过程*\n> \n> a\n> <")
    assert "<b>" not in ended
    assert ended.endswith("\n\nFour legs.")
    assert shown(talk, CHINESE)[-1]["content"] == "Four legs."


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_of_a_server_are_read(name: str) -> None:
    reader = ChunkReader()
    chunk = {"choices": [{"delta": {name: "2 and 2", "content": None}}]}
    assert list(reader.chunk(chunk)) == [ThoughtDelta("2 and 2")]
    both = {"choices": [{"delta": {name: "2", "content": "4"}}]}
    assert list(reader.chunk(both)) == [ThoughtDelta("2"), TextDelta("4")]
    assert list(reader.chunk({"choices": [{"delta": {name: 3}}]})) == []
