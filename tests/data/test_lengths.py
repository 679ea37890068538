"""Limits that nobody gave are those of the data, within the model's context; what is cut is said in numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from glmtune.data.dataset import load_conversations, load_split
from glmtune.data.lengths import (
    NO_ANSWERS_TARGET,
    RowLengths,
    limit_for,
    prediction_lengths,
    resolve_lengths,
    training_lengths,
)
from glmtune.data.settings import DataSettings
from glmtune.data.truncation import TruncationCounts, Unseen, unseen_of
from glmtune.errors import ConfigError

FRAME = len("[Round 1]\n\n问：\n\n答：") + 2


def rows(write, pairs, name: str = "rows.jsonl") -> str:
    return write(name, "\n".join(json.dumps({"prompt": q, "response": a}) for q, a in pairs))


def counted(prompts: list[int], answers: list[int]) -> RowLengths:
    return RowLengths(np.array(prompts), np.array(answers))


def limits(settings: DataSettings) -> tuple[int | None, int | None]:
    return settings.max_source_length, settings.max_target_length


def test_lengths_are_open_unless_given() -> None:
    assert limits(DataSettings()) == (None, None)


@pytest.mark.parametrize(
    ("lengths", "limit"),
    [([1], 8), ([8], 8), ([9], 16), ([10] * 99 + [1000], 16), ([10] * 98 + [99] * 2, 104)],
)
def test_a_limit_holds_99_of_100_rows(lengths: list[int], limit: int) -> None:
    assert limit_for(np.array(lengths)) == limit


@pytest.mark.parametrize(
    ("given", "prompts", "answers", "context", "found"),
    [
        ({}, 100, 50, None, (104, 56)),
        ({}, 100, 50, 2048, (104, 56)),
        ({}, 5000, 50, 2048, (1991, 56)),  # the answer keeps what it needs, end token included
        ({}, 50, 5000, 2048, (56, 1991)),
        ({}, 5000, 5000, 2048, (1023, 1024)),
        ({"max_source_length": 64}, 5000, 5000, 2048, (64, 1983)),
        ({"max_target_length": 200}, 5000, 10, 2048, (1847, 200)),
        ({"max_source_length": 3000, "max_target_length": 3000}, 10, 10, 2048, (3000, 3000)),
    ],
)
def test_open_limits_share_the_context(given, prompts, answers, context, found) -> None:
    resolved = resolve_lengths(DataSettings(**given), counted([prompts] * 5, [answers] * 5), context=context)
    assert limits(resolved) == found


def test_questions_alone_leave_room_for_an_answer(chatglm2, write) -> None:
    path = write("questions.jsonl", json.dumps({"prompt": "q" * 30, "response": ""}))
    settings = DataSettings(test_file=path)
    loaded = load_conversations(settings, "test", need_answers=False)
    found = prediction_lengths(loaded.conversations, chatglm2, settings)
    assert limits(resolve_lengths(settings, found)) == (limit_for(np.array([FRAME + 30])), NO_ANSWERS_TARGET)


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "chatglm3"])
def test_limits_of_the_data_cut_at_most_one_row_in_a_hundred(request, write, name: str) -> None:
    tokenizer = request.getfixturevalue(name)
    pairs = [("q" * (1 + 3 * number), "a" * (1 + 2 * number)) for number in range(199)]
    path = rows(write, [*pairs, ("q" * 5000, "a" * 5000)])
    split = load_split(DataSettings(train_file=path), "train", tokenizer, context=100_000)
    assert split.truncation.rows_with_cut_question == split.truncation.rows_with_cut_answer == 1
    source, target = limits(split.settings)
    assert source is not None
    assert target is not None
    assert source < 700
    assert target < 450
    assert int(split.lengths.max()) <= source + target + 1


def test_rows_for_every_answer_are_all_measured(chatglm2, write) -> None:
    row = {"messages": [{"role": role, "content": text} for role, text in
                        (("user", "q"), ("assistant", "a" * 300), ("user", "r"), ("assistant", "b"))]}  # fmt: skip
    path = write("turns.jsonl", json.dumps(row))
    for loss_on, target in (("answer", 8), ("all_turns", 304)):
        split = load_split(DataSettings(train_file=path, loss_on=loss_on), "train", chatglm2)
        assert split.settings.max_target_length == target
        assert split.truncation == TruncationCounts()


def test_answers_that_are_not_learnt_count(chatglm3, write) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 50, "loss": False}]
    path = write("rows.jsonl", json.dumps({"messages": messages}))
    settings = DataSettings(train_file=path)
    loaded = load_conversations(settings, "train")
    assert training_lengths(loaded.conversations, chatglm3, settings).answers.tolist() == [51]


def test_validation_is_cut_as_training(chatglm2, write) -> None:
    train, dev = rows(write, [("q", "a")] * 3), rows(write, [("q" * 99, "a" * 99)], "dev.jsonl")
    settings = DataSettings(train_file=train, validation_file=dev)
    learnt = load_split(settings, "train", chatglm2)
    checked = load_split(learnt.settings, "validation", chatglm2)
    assert limits(checked.settings) == limits(learnt.settings)
    assert checked.truncation.rows_with_cut_answer == 1


def test_packed_rows_must_hold_the_lengths_of_the_data(chatglm2, write) -> None:
    path = rows(write, [("q" * 100, "a" * 100)] * 3)
    settings = DataSettings(train_file=path, packing=True, packing_length=200)
    with pytest.raises(ConfigError, match=r"`data\.packing_length` is 200.*at least \d+"):
        load_split(settings, "train", chatglm2)
    assert (
        load_split(DataSettings(train_file=path, packing=True), "train", chatglm2).truncation.words(3) == ""
    )


def test_a_system_message_goes_before_rows_without_one(chatglm3, write) -> None:
    own = {"messages": [{"role": role, "content": text} for role, text in
                        (("system", "own"), ("user", "q"), ("assistant", "a"))]}  # fmt: skip
    bare = {"messages": own["messages"][1:]}
    path = write("rows.jsonl", "\n".join(json.dumps(row) for row in (own, bare)))
    loaded = load_conversations(DataSettings(train_file=path, system="be kind"), "train")
    assert [each.messages[0].content for each in loaded.conversations] == ["own", "be kind"]
    assert load_split(DataSettings(train_file=path), "train", chatglm3).system is None, "not of all rows"
    alike = write("alike.jsonl", "\n".join(json.dumps(row) for row in (own, own)))
    assert load_split(DataSettings(train_file=alike), "train", chatglm3).system == "own"


def test_unseen_is_one_line_of_numbers() -> None:
    unseen = Unseen(200, TruncationCounts(2, 3, 4, 5, 60, 7000), ("id", "messages[].name"), 6)
    assert unseen.line() == (
        "200 rows; cut: 2 (1.0 %) lose old turns (5 turns), 3 (1.5 %) lose the question's end (60 tokens), "
        "4 (2.0 %) lose the answer's end (7,000 tokens); not read: 2 (id, messages[].name); "
        "left out: 6 rows that cannot be used"
    )
    assert unseen_of(json.loads(json.dumps(unseen.values()))) == unseen
    assert Unseen(1, TruncationCounts(), ()).line() == "1 rows; nothing cut"
