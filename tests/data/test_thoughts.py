"""Thoughts in training rows: their loss is a setting, and the spans are exact with every kind of template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glmtune.data.encode import encode_training_row
from glmtune.data.lengths import training_lengths
from glmtune.data.records import Conversation, RowProblem
from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError
from glmtune.labels import IGNORE_INDEX
from glmtune.messages import Message
from glmtune.models.templates.renderer import template_for
from tests.models.templates.chat_folders import FORMS, chat_tokenizer

ASKED = Message("user", "How many legs?")
THOUGHTFUL = Message("assistant", "<think>\n2 and 2\n</think>\nFour.")
PLAIN = Message("assistant", "Four.")
KINDS = ["roles", "edge", "thinking", "kept-thoughts", "last-thoughts", "no-thoughts"]


def rows(tokenizer: Any, *messages: Message, **settings: Any) -> list[tuple[str, str]]:
    """Text of the ids and of what is learnt, row by row."""
    limits = {"max_source_length": 1000, "max_target_length": 1000} | settings
    found = encode_training_row(tokenizer, Conversation(messages, "rows.jsonl", 1), DataSettings(**limits))
    return [
        (
            tokenizer.decode(row.input_ids),
            tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX]),
        )
        for row in found
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_thoughts_are_learnt_or_not(kind: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, FORMS[kind])
    opening = template_for(tokenizer).answer_opening
    ((text, learnt),) = rows(tokenizer, ASKED, THOUGHTFUL)
    assert "2 and 2" in learnt
    assert f"{opening}{learnt}".lstrip().startswith("<think>")
    assert learnt.endswith("</think>\nFour.<|endoftext|>")
    assert text.endswith(learnt)
    ((same, answer),) = rows(tokenizer, ASKED, THOUGHTFUL, loss_on_thoughts=False)
    assert same == text
    assert answer.lstrip("\n") == "Four.<|endoftext|>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_thoughts(kind: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, FORMS[kind])
    opens = bool(template_for(tokenizer).answer_opening)
    ((_, learnt),) = rows(tokenizer, ASKED, PLAIN)
    assert learnt.lstrip("\n") == "</think>\nFour.<|endoftext|>" if opens else "Four.<|endoftext|>"
    ((_, answer),) = rows(tokenizer, ASKED, PLAIN, loss_on_thoughts=False)
    assert answer.lstrip("\n") == "Four.<|endoftext|>"


@pytest.mark.parametrize("kind", KINDS)
def test_every_turn_with_and_without_thoughts(kind: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, FORMS[kind])
    talk = (
        ASKED,
        THOUGHTFUL,
        ASKED,
        Message("assistant", "<think>1</think>Two.", has_loss=False),
        ASKED,
        PLAIN,
    )
    everything = rows(tokenizer, *talk, loss_on="all_turns")
    answers = rows(tokenizer, *talk, loss_on="all_turns", loss_on_thoughts=False)
    assert [text for text, _ in everything] == [text for text, _ in answers]
    learnt = "".join(part for _, part in answers)
    assert "2 and 2" not in learnt
    assert "Two" not in learnt
    assert learnt.count("Four.") == 2
    if kind == "roles":
        ((text, whole),) = everything
        assert whole == "\n<think>\n2 and 2\n</think>\nFour.<|user|>\nFour.<|endoftext|>"
        assert learnt.replace("\n", "") == "Four.<|user|>Four.<|endoftext|>"
        assert text.count("<think>") == 2
    else:
        assert len(everything) == 2
        first, last = everything
        assert first[0].count("How many") == 1
        assert ("2 and 2" in last[0]) == (kind in ("edge", "kept-thoughts"))


def test_an_existing_family_learns_thoughts_as_a_part_of_the_answer(tiny_tokenizer: Any) -> None:
    ((_, learnt),) = rows(tiny_tokenizer, ASKED, THOUGHTFUL)
    assert "2 and 2" in learnt
    ((_, answer),) = rows(tiny_tokenizer, ASKED, THOUGHTFUL, loss_on_thoughts=False)
    assert "2 and 2" not in answer
    assert "Four" in answer


def test_an_answer_cut_within_its_thoughts_is_no_row(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, FORMS["thinking"])
    with pytest.raises(
        RowProblem, match=r"`data\.max_target_length` = 3 cuts its answer within the thoughts"
    ):
        rows(tokenizer, ASKED, THOUGHTFUL, max_target_length=3, loss_on_thoughts=False)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_that_the_data_tells_hold_thoughts(kind: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, FORMS[kind])
    talks = [Conversation((ASKED, THOUGHTFUL), "rows.jsonl", 1)]
    counted = [
        training_lengths(talks, tokenizer, DataSettings(loss_on_thoughts=learnt)).answers.tolist()
        for learnt in (True, False)
    ]
    assert counted[0] == counted[1]
    assert counted[0] == [len(template_for(tokenizer).encode_answer(tokenizer, THOUGHTFUL)) - 1]


def test_thoughts_that_never_end_are_no_row(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, FORMS["thinking"])
    with pytest.raises(RowProblem, match="never closes them"):
        rows(tokenizer, ASKED, Message("assistant", "<think>2 and"))


def test_everything_takes_thoughts_in() -> None:
    with pytest.raises(
        ConfigError, match=r"`data\.loss_on_thoughts` is false, but `data\.loss_on` is `everything`"
    ):
        DataSettings(loss_on="everything", loss_on_thoughts=False)
