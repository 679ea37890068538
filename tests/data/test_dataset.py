"""Splits are encoded compactly, with their counts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from glmtune.data.dataset import load_conversations, load_split
from glmtune.data.encode import encode_training_row
from glmtune.data.encoded import table
from glmtune.data.settings import DataSettings
from glmtune.errors import DataError
from glmtune.labels import IGNORE_INDEX


@pytest.fixture
def rows_path(write) -> str:
    rows = [{"prompt": "q" * (1 + n % 30), "response": "a" * (1 + n % 7)} for n in range(50)]
    return write("rows.jsonl", "\n".join(json.dumps(row) for row in rows))


def settings(path: str, **more: object) -> DataSettings:
    return DataSettings(**{"train_file": path, "max_source_length": 40, "max_target_length": 5, **more})


@pytest.mark.parametrize("rows_per_table", [7, 50, 1000])
def test_rows_lengths_and_counts(chatglm2, rows_path, monkeypatch, rows_per_table: int) -> None:
    monkeypatch.setattr(table, "ROWS_PER_TABLE", rows_per_table)
    split = load_split(settings(rows_path), "train", chatglm2)
    loaded = load_conversations(settings(rows_path), "train")
    expected = [encode_training_row(chatglm2, item, settings(rows_path))[0] for item in loaded.conversations]
    assert split.rows["input_ids"][:] == [row.input_ids for row in expected]
    assert split.rows["labels"][:] == [row.labels for row in expected]
    assert split.rows["length"][:] == split.lengths.tolist() == [len(row.input_ids) for row in expected]
    assert split.lengths.dtype == np.int32
    assert split.rows.features["input_ids"].feature.dtype == "int32"
    assert split.num_tokens == sum(len(row.input_ids) for row in expected)
    assert split.num_loss_tokens == sum(label != IGNORE_INDEX for row in expected for label in row.labels)
    counts = split.truncation
    assert counts.rows_with_cut_question == sum(row.cut_question_tokens > 0 for row in expected) > 0
    assert counts.cut_question_tokens == sum(row.cut_question_tokens for row in expected)
    assert counts.rows_with_cut_answer == sum(row.cut_answer_tokens > 0 for row in expected) > 0
    assert counts.cut_answer_tokens == sum(row.cut_answer_tokens for row in expected)
    assert counts.rows_with_dropped_turns == counts.dropped_turns == 0
    assert split.fingerprint == loaded.fingerprint


def test_every_turn_is_a_row(chatglm2, write) -> None:
    path = write("chat.json", json.dumps([{"prompt": "r", "response": "b", "history": [["q", "a"]]}]))
    split = load_split(settings(path, max_source_length=60, loss_on="all_turns"), "train", chatglm2)
    assert (split.num_conversations, len(split.rows)) == (1, 2)


def test_rows_that_cannot_fit_are_reported_or_skipped(chatglm2, rows_path, write) -> None:
    rows = [{"instruction": "q", "output": "a", "system": "S" * length} for length in (1, 90, 3)]
    path = write("long.json", json.dumps(rows, indent=1))
    with pytest.raises(DataError, match=r"line 7: .*max_source_length` = 40.*system message") as caught:
        load_split(settings(path), "train", chatglm2)
    assert caught.value.line == 7
    split = load_split(settings(path, on_bad_row="skip"), "train", chatglm2)
    assert (split.num_conversations, len(split.rows), [row.line for row in split.bad]) == (2, 2, [7])
    with pytest.raises(DataError, match="50 of 50 rows"):
        load_split(settings(rows_path, max_source_length=3, on_bad_row="skip"), "train", chatglm2)


def test_progress_goes_to_the_error_stream(chatglm2, rows_path, capsys) -> None:
    load_split(settings(rows_path), "train", chatglm2, progress=True)
    assert capsys.readouterr().out == ""
