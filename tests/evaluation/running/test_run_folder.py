"""Journals: half-written ends, damaged middles, other runs, full disks, two writers."""

from __future__ import annotations

import dataclasses
import json
import os
import re

import pytest

from evaluation.answer import Answer, parse_answer
from evaluation.running.run_folder import journal_path, lock_run, open_run, read_journals
from glmtune.errors import ConfigError, DataError, GlmtuneError
from glmtune.storage.journal import Journal

IDENTITY = {"data_hash": "d1", "model": {"weights_hash": "w1", "dtype": "float32"}, "num_samples": 2}
ANSWER = Answer(
    "law",
    3,
    prompt_hash="ab",
    completion="Because\n答案是 B",
    choice_logprobs=(-1.5, -0.25),
    extracted={"official": "B", "strict": None},
    stop_reason="eos",
    num_prompt_tokens=7,
    num_new_tokens=4,
    num_fewshot=5,
    seconds=0.25,
    extra={"note": [1]},
)


def opened(folder, identity, **resume):
    with lock_run(folder) as journal:
        return open_run(journal, identity, **resume)


def write(folder, *answers, rank=0):
    opened(folder, IDENTITY)
    with Journal(journal_path(folder, rank)) as journal:
        for answer in answers:
            journal.append(answer)
    return journal.path


def test_answers_come_back_as_they_were(tmp_path):
    path = write(tmp_path / "run", ANSWER, dataclasses.replace(ANSWER, index=4, completion=None))
    assert opened(tmp_path / "run", IDENTITY).answers[("law", 3)] == ANSWER
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert {
        "subject",
        "index",
        "prompt_hash",
        "completion",
        "choice_logprobs",
        "extracted",
        "stop_reason",
        "seconds",
    } <= set(row)
    assert row["note"] == [1]
    assert "seconds" not in ANSWER.to_values(with_timing=False)


@pytest.mark.parametrize(
    "end", [b'{"subject": "la', b'{"subject": "law", "in\n', b"\x00\x00\x00\n", b"\xe7\xad"]
)
def test_a_half_written_last_line_is_dropped_and_said(tmp_path, end):
    path = write(tmp_path, ANSWER)
    whole = path.read_bytes()
    path.write_bytes(whole + end)
    run = opened(tmp_path, IDENTITY)
    assert list(run.answers) == [("law", 3)]
    assert len(run.notes) == 1
    assert f"({len(end)} bytes" in run.notes[0]
    assert str(path) in run.notes[0]
    assert path.read_bytes() == whole
    assert opened(tmp_path, IDENTITY).notes == ()


def test_a_damaged_middle_line_costs_that_line_and_is_said(tmp_path):
    path = write(tmp_path, ANSWER, dataclasses.replace(ANSWER, index=4), dataclasses.replace(ANSWER, index=5))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"subject": "law"}\n' + lines[2])
    run = opened(tmp_path, IDENTITY)
    assert list(run.answers) == [("law", 3), ("law", 5)]
    assert re.search(
        r"journal-rank0.jsonl: 1 lines cannot be read \(line 2: the field `index` is missing\)", run.notes[0]
    )
    assert (tmp_path / "journal-rank0.jsonl.damaged").read_bytes() == b'{"subject": "law"}\n'
    assert opened(tmp_path, IDENTITY).notes == ()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data_hash": "d2"}, 'data_hash: "d1" there, "d2" now'),
        (
            {"model": {"weights_hash": "w1", "dtype": "bfloat16"}},
            'model.dtype: "float32" there, "bfloat16" now',
        ),
        ({"extra": 1}, "extra: nothing there, 1 now"),
    ],
)
def test_another_run_is_refused_by_its_differences(tmp_path, changed, words):
    write(tmp_path, ANSWER)
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, {**IDENTITY, **changed})
    assert words in str(caught.value)
    assert "resume=false" in str(caught.value)
    assert "weights_hash" not in str(caught.value)
    assert list(opened(tmp_path, IDENTITY).answers) == [("law", 3)]


def test_a_run_without_answers_may_change(tmp_path):
    opened(tmp_path, IDENTITY)
    assert opened(tmp_path, {**IDENTITY, "data_hash": "d2"}).answers == {}


def test_answers_of_unknown_origin_are_refused(tmp_path):
    write(tmp_path, ANSWER)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"there is no run.json beside it"):
        opened(tmp_path, IDENTITY)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run.json: it is no valid JSON"):
        opened(tmp_path, IDENTITY)


def test_resume_false_begins_anew_and_deletes_nothing(tmp_path):
    write(tmp_path, ANSWER)
    (tmp_path / "results.json").write_text("old")
    assert opened(tmp_path, {"other": 1}, resume=False).answers == {}
    assert sorted(path.name for path in (tmp_path / "earlier-1").iterdir()) == [
        "journal-rank0.jsonl",
        "results.json",
        "run.json",
    ]
    with Journal(journal_path(tmp_path, 0)) as journal:
        journal.append(ANSWER)
    opened(tmp_path, {"other": 2}, resume=False)
    assert (tmp_path / "earlier-2" / "journal-rank0.jsonl").is_file()
    assert opened(tmp_path / "new", IDENTITY, resume=False).answers == {}


def test_journals_of_all_processes_are_one(tmp_path):
    first = dataclasses.replace(ANSWER, choice_logprobs=None)
    write(tmp_path, first)
    with Journal(journal_path(tmp_path, 3)) as journal:
        journal.append(ANSWER)
        journal.append(dataclasses.replace(ANSWER, index=9))
    answers = read_journals(tmp_path)
    assert answers[("law", 3)].choice_logprobs == (-1.5, -0.25)
    assert len(answers) == 2


def test_two_writers_are_refused(tmp_path):
    write(tmp_path, ANSWER)
    with Journal(journal_path(tmp_path, 0)):
        with pytest.raises(ConfigError, match=r"journal-rank0.jsonl is being written by another process"):
            Journal(journal_path(tmp_path, 0))
        with pytest.raises(ConfigError, match="written by another process"):
            opened(tmp_path, IDENTITY)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_without_an_answer_yet_is_not_taken_over(tmp_path, rank):
    opened(tmp_path, IDENTITY)
    with Journal(journal_path(tmp_path, rank)) as journal:
        for resume in (True, False):
            with pytest.raises(ConfigError, match=rf"journal-rank{rank}.jsonl is being written by another"):
                opened(tmp_path, {"other": 1}, resume=resume)
        journal.append(ANSWER)
    assert list(opened(tmp_path, IDENTITY).answers) == [("law", 3)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full to play a full disk")
def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    path = write(tmp_path, ANSWER)
    opened(tmp_path, IDENTITY)
    (tmp_path / "journal-rank1.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        GlmtuneError, match=r"journal-rank1.jsonl cannot be written \(No space left on device\).*goes on"
    ):
        with Journal(journal_path(tmp_path, 1)) as journal:
            journal.append(ANSWER)
    assert parse_answer(path.read_text(encoding="utf-8")) == ANSWER


def test_an_unwritable_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"`output_dir` is `.*file/run`, but it cannot be written"):
        opened(tmp_path / "file" / "run", IDENTITY)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "no JSON object"),
        ('{"index": 1}', "the field `subject` is missing"),
        ('{"subject": "a", "index": -1}', "`index` is -1, but it must be a whole number from 0"),
        ('{"subject": "a", "index": true}', "`index` is true"),
        ('{"subject": "a", "index": 0, "completion": 5}', "`completion` is 5, but it must be a text or null"),
        ('{"subject": "a", "index": 0, "choice_logprobs": [NaN]}', "`choice_logprobs` is .NaN."),
        ('{"subject": "a", "index": 0, "stop_reason": "bored"}', '`stop_reason` is "bored"'),
        ('{"subject": "a", "index": 0, "extracted": 3}', "`extracted` is 3"),
        ('{"subject": "a", "index": 0, "num_fewshot": "x"}', "`num_fewshot` is"),
    ],
)
def test_bad_lines_say_what_is_wrong(line, message):
    with pytest.raises(ValueError, match=message):
        parse_answer(line)
