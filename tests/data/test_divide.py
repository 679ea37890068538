"""Rows kept from training are the same in every process, and none of them is learnt."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from glmtune.data.check import check_data
from glmtune.data.dataset import load_conversations
from glmtune.data.divide import kept_for_evaluation, question_key
from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError


@pytest.fixture
def rows(write):
    """60 rows with 20 questions, of which the first ten occur five times."""
    questions = [*(f"q{number % 10}" for number in range(50)), *(f"q{number}" for number in range(10, 20))]
    lines = [json.dumps({"prompt": name, "response": str(place)}) for place, name in enumerate(questions)]
    return write("rows.jsonl", "\n".join(lines))


def parts(path: str, **settings):
    chosen = DataSettings(train_file=path, **settings)
    return [load_conversations(chosen, split).conversations for split in ("train", "validation")]


@pytest.mark.parametrize("frac", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("seed", [1, 42])
def test_parts_are_disjoint_and_whole(rows: str, frac: float, seed: int) -> None:
    train, kept = parts(rows, validation_frac=frac, validation_seed=seed)
    assert {item.line for item in train} | {item.line for item in kept} == set(range(1, 61))
    assert len(train) + len(kept) == 60
    assert not {item.prompt for item in train} & {item.prompt for item in kept}
    assert abs(len(kept) - 60 * frac) <= 4, "but for what a group of five may leave over"


def test_which_rows_are_kept_follows_from_text_and_seed(rows: str, write, talk) -> None:
    kept = {item.messages for item in parts(rows, validation_frac=0.2)[1]}
    lines = Path(rows).read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    shuffled = write("shuffled.jsonl", "\n".join(lines))
    assert {item.messages for item in parts(shuffled, validation_frac=0.2)[1]} == kept
    assert {item.messages for item in parts(rows, validation_frac=0.2, validation_seed=1)[1]} != kept


def test_prediction_takes_the_rows_that_were_kept(rows: str) -> None:
    settings = DataSettings(train_file=rows, validation_frac=0.2, max_predict_samples=3, max_eval_samples=5)
    kept = load_conversations(settings, "validation").conversations
    asked = load_conversations(settings, "test", need_answers=False).conversations
    assert len(kept) == 5
    assert list(asked) == list(kept[:3])
    assert len(load_conversations(settings, "train").conversations) == 48


def test_rows_that_cannot_be_learnt_do_not_move_the_others(write) -> None:
    lines = [json.dumps({"prompt": f"q{i}", "response": "" if i % 3 == 0 else "a"}) for i in range(30)]
    settings = DataSettings(
        train_file=write("a.jsonl", "\n".join(lines)), validation_frac=0.3, on_bad_row="skip"
    )
    train = load_conversations(settings, "train")
    asked = load_conversations(settings, "test", need_answers=False)
    assert not {item.line for item in train.conversations} & {item.line for item in asked.conversations}
    assert (len(train.bad), len(asked.bad)) == (10, 0)


def test_too_few_rows(write, talk) -> None:
    path = write("a.jsonl", '{"prompt": "q", "response": "a"}\n' * 5)
    with pytest.raises(ConfigError, match=r"validation_frac.*5 rows.*same question stay together"):
        load_conversations(DataSettings(train_file=path, validation_frac=0.2), "train")
    assert kept_for_evaluation([], 0.1) == []
    keys = [question_key(each, 1) for each in (talk("a", "b"), talk("c", "d"))]
    assert sorted(kept_for_evaluation(keys, 0.01)) == [False, True]


def test_the_check_reports_both_parts(rows: str, chatglm2) -> None:
    report = check_data(DataSettings(train_file=rows, validation_frac=0.2), chatglm2)
    assert [split.split for split in report.splits] == ["train", "validation"]
    assert [overlap.num_same_prompt for overlap in report.overlaps] == [0]
