"""Thoughts kept apart from answers, in whole texts and in texts that come in pieces."""

from __future__ import annotations

import random

import pytest

from glmtune.models.releases.families import Family
from glmtune.models.templates.responses import process_response
from glmtune.models.templates.streamed_responses import ThoughtSplit
from glmtune.models.templates.thinking import split_thoughts

TEXTS = [
    "<think>2 and 2</think>4",
    "\n<think>\n a\n\n b \n</think>\n\n 4 ",
    "<think></think>\n4",
    "<think>\n",
    "<think>cut < /think> </thin",
    "<thin air",
    "  no thoughts, but </think> and <think> are spoken of",
    "<think>a</think>b<think>c</think>d",
    "",
    " \n ",
    "<think>你好</think>\n\n",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_split_as_the_whole(text: str, seed: int) -> None:
    split, rng, rest = ThoughtSplit(), random.Random(seed), text
    parts: list[tuple[str, str]] = []
    while rest:
        num = rng.randrange(1, 4)
        parts.append(split.feed(rest[:num]))
        rest = rest[num:]
    parts.append(split.finish())
    thoughts, answer = ("".join(each) for each in zip(*parts, strict=True))
    assert (thoughts, answer.strip()) == split_thoughts(text)


def test_thoughts_come_while_they_are_written() -> None:
    split = ThoughtSplit()
    assert [split.feed(each) for each in ("<think>", "\n", "one", " two ", "</th", "ink>", "\n", "4")] == [
        ("", ""), ("", ""), ("one", ""), (" two", ""), ("", ""), ("", ""), ("", ""), ("", "4"),
    ]  # fmt: skip


def test_a_response_keeps_thoughts_apart() -> None:
    response = process_response(Family.TRANSFORMERS, "<think>\n2 and 2\n</think>\n4")
    assert (response.thoughts, response.content) == ("2 and 2", "4")
    assert [message.content for message in response.messages] == ["4"]
    cut = process_response(Family.TRANSFORMERS, "<think>2 and")
    assert (cut.thoughts, cut.content) == ("2 and", "")
    plain = process_response(Family.TRANSFORMERS, "\nHello\nWorld ")
    assert (plain.thoughts, plain.content) == ("", "Hello\nWorld")


@pytest.mark.parametrize("family", [each for each in Family if each is not Family.TRANSFORMERS])
def test_releases_answer_as_before(family: Family) -> None:
    text = "<think>a</think>b"
    assert process_response(family, text).content == text
    assert process_response(family, text).thoughts == ""


CALL = 'clock\n{"zone": "北京"}'


@pytest.mark.parametrize("text", [CALL, f"<think>a</think>\n{CALL}", f"\n<think>\n</think>\n\n{CALL} "])
def test_calls_are_read_where_tools_were_announced(text: str) -> None:
    response = process_response(Family.TRANSFORMERS, text, tools_announced=True)
    assert response.content == {"name": "clock", "parameters": {"zone": "北京"}}
    (message,) = response.messages
    assert (message.metadata, message.content) == ("clock", '{"zone": "北京"}')
    assert process_response(Family.TRANSFORMERS, text).content == CALL


@pytest.mark.parametrize("text", ["\nclock\n{}", "Good morning,\n{x}", "clock\nis a word", "clock", "{}"])
def test_what_only_looks_like_a_call_is_text(text: str) -> None:
    response = process_response(Family.TRANSFORMERS, text, tools_announced=True)
    assert response.content == text.strip()


def test_a_call_that_is_no_json_is_shown_as_it_is() -> None:
    response = process_response(Family.TRANSFORMERS, 'clock\n{"zone": ', tools_announced=True)
    assert response.content == {"name": "clock", "content": '{"zone":'}


def test_messages_that_go_on_by_themselves_are_parted() -> None:
    text = f"<think>a</think>Let me see.<|assistant|>{CALL}"
    response = process_response(Family.TRANSFORMERS, text, tools_announced=True)
    assert response.thoughts == "a"
    assert [each.content for each in response.messages] == ["Let me see.", '{"zone": "北京"}']
    assert response.content == {"name": "clock", "parameters": {"zone": "北京"}}
