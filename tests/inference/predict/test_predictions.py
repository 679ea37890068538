"""Reading and writing predictions files, good and bad."""

from __future__ import annotations

import json
import os

import pytest

from glmtune.errors import ConfigError, DataError, GlmtuneError
from glmtune.inference.predict.predictions import (
    Prediction,
    find_predictions,
    identity_beside,
    parse_prediction,
    read_predictions,
)
from glmtune.storage.files import write_text_atomically
from glmtune.storage.journal import Journal

ROW = Prediction(
    row=3, prediction="好看\u2028的裤子", reference="好看", prompt="问：裤子\n\n答：", stop_reason="eos",
    num_new_tokens=7, full_reference="好看的裤子", scores={"bleu-4": 12.5},
)  # fmt: skip


def official(path, *pairs, join="\n"):
    lines = [json.dumps({"labels": label, "predict": text}, ensure_ascii=False) for text, label in pairs]
    path.write_text(join.join(lines), encoding="utf-8")
    return path


def repaired(path):
    with Journal(path) as journal:
        return journal.repair(parse_prediction).entries


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "p.jsonl"
    lone = Prediction(row=0, prediction="\ud83d", reference=None)
    with Journal(path) as journal:
        journal.append(ROW)
        journal.append(lone)
        assert read_predictions(path) == [lone, ROW]
        journal.rewrite(read_predictions(path))
    assert [json.loads(line)["row"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == [0, 3]
    assert not list(tmp_path.glob(".*.partial"))


def test_official_file_is_read(tmp_path):
    rows = read_predictions(official(tmp_path / "x.txt", ("甲", "乙"), ("", "丁")))
    assert [(row.row, row.prediction, row.reference) for row in rows] == [(0, "甲", "乙"), (1, "", "丁")]


def test_official_file_of_the_first_release_has_no_line_breaks(tmp_path):
    rows = read_predictions(official(tmp_path / "x.txt", ("甲", "乙"), ("丙", "丁"), join=""))
    assert [row.prediction for row in rows] == ["甲", "丙"]


def test_byte_order_mark_and_gb18030_are_read(tmp_path):
    line = '{"labels": "裙子", "predict": "衬衫"}'
    for encoding in ("utf-8-sig", "gb18030"):
        (tmp_path / "x.txt").write_text(line, encoding=encoding)
        assert read_predictions(tmp_path / "x.txt")[0].reference == "裙子"


def test_unfinished_last_line_is_dropped_from_the_journal(tmp_path):
    path = tmp_path / "p.jsonl"
    assert repaired(path) == []
    with Journal(path) as journal:
        journal.append(ROW)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert repaired(path) == [ROW]
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    assert repaired(path) == []
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"labels": "a", "predict": "b"}\n{"labels": "a"\n', r"line 2: `\{\"labels\": \"a\"` is no JSON object"),
        ('{"text": "a"}', r"line 1: the fields `prediction` and `reference`.*fields are: text"),
        ("[1]", r"line 1: a JSON object is needed, not list"),
        ('{"labels": 5, "predict": "b"}', r"line 1: `labels` is 5, but it must be a text"),
        ('{"prediction": "a", "reference": "b", "row": "x"}', r"line 1: `row` is \"x\", but it must be the number of a row"),
        ('{"prediction": "a", "reference": "b", "num_new_tokens": null}', r"`num_new_tokens` is null"),
        ("1\n2\n3\n", r"line 1: a JSON.*2 more bad lines: line 2: .*line 3"),
        ("", r"holds no predictions"),
        ('{"prediction":"a","reference":"b","row":4}\n{"prediction":"a","reference":"b","row":4}', "row 4 occurs twice"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_line_and_reason(tmp_path, text, message):
    path = tmp_path / "bad.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        read_predictions(path)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xff\xff")
    with pytest.raises(DataError, match="neither UTF-8 nor GB18030"):
        read_predictions(tmp_path / "x.txt")


def test_folders_stand_for_the_file_in_them(tmp_path):
    file = official(tmp_path / "generated_predictions.txt", ("a", "b"))
    assert find_predictions(tmp_path, "a") == file
    assert find_predictions(file, "a") == file
    (tmp_path / "run" / "predict").mkdir(parents=True)
    (tmp_path / "run" / "predict" / "generated_predictions.jsonl").touch()
    assert find_predictions(tmp_path / "run", "a").name == "generated_predictions.jsonl"
    with pytest.raises(ConfigError, match=r"`b` is `.*absent`, but there is no such file"):
        find_predictions(tmp_path / "absent", "b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"`b` is `.*empty`, but neither it nor its folder `predict`"):
        find_predictions(tmp_path / "empty", "b")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full to play a full disk")
def test_full_disk_is_reported(tmp_path):
    path = tmp_path / "p.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(GlmtuneError, match=r"p.jsonl cannot be written \(No space left on device\).*goes on"):
        with Journal(path) as journal:
            journal.append(ROW)
    (tmp_path / ".q.jsonl.partial").symlink_to("/dev/full")
    with pytest.raises(GlmtuneError, match=r"q.jsonl cannot be written \(No space left"):
        write_text_atomically(tmp_path / "q.jsonl", "x")


def test_identity_is_read_if_there_is_one(tmp_path):
    file = tmp_path / "p.jsonl"
    assert identity_beside(file) is None
    identity = tmp_path / "predict_config.json"
    identity.write_text('{"num_rows": 5}')
    assert identity_beside(file) == {"num_rows": 5}
    for text, message in (("{", "is no JSON:"), ("[]", "is no JSON object")):
        identity.write_text(text)
        with pytest.raises(DataError, match=message):
            identity_beside(file)


def test_predictions_of_llama_factory(tmp_path):
    path = tmp_path / "generated_predictions.jsonl"
    rows = [{"prompt": "问", "predict": "好", "label": "好看"}, {"prompt": "", "predict": "", "label": "x"}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    found = read_predictions(path)
    assert [(row.row, row.prompt, row.prediction, row.reference) for row in found] == [
        (0, "问", "好", "好看"),
        (1, "", "", "x"),
    ]
    path.write_text('{"predict": "a", "label": 3}')
    with pytest.raises(DataError, match="label"):
        read_predictions(path)
