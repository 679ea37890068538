"""The exam: its questions, what a model is asked, how its answers are judged, and questions of a user's own."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.exam import CATEGORIES, ROWS
from evaluation.benchmarks.sources import download_of
from evaluation.benchmarks.tasks import make_task
from evaluation.extraction import keyed
from evaluation.extraction.text import plain
from evaluation.sample import Sample
from evaluation.task import Task
from glmtune.data.reading.shipped import resolve_shipped
from glmtune.errors import ConfigError, DataError
from glmtune.messages import Message

ROW = {"question": "1+1=?", "answer": "2", "rule": "number", "category": "arithmetic", "language": "zh"}


def write(folder: Path, *rows: dict[str, Any], counts: dict[str, int] | None = None) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "exam.jsonl").write_text("\n".join(lines), encoding="utf-8")
    if counts is not None:
        description = json.dumps({"rows": {"test": counts}})
        (folder / "sample_set.json").write_text(description, encoding="utf-8")
    return folder


def test_it_needs_no_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GLMTUNE_DATA", raising=False)
    task = make_task("exam")
    assert len(task.samples) == sum(ROWS.values()) >= 360
    assert Counter(sample.subject for sample in task.samples) == ROWS
    assert task.data_hash == make_task("exam", data_dir="sample").data_hash
    assert (task.is_sample_set, task.is_partial, task.labelled) == (False, False, True)
    assert set(task.categories.values()) == set(CATEGORIES)
    assert "Apache-2.0" in task.licence
    assert len(make_task("exam", limit=3).samples) == 3 * len(ROWS)
    assert {s.subject for s in make_task("exam", subjects=["facts_zh"]).samples} == {"facts_zh"}


def test_both_languages_and_every_rule_are_asked() -> None:
    samples = make_task("exam").samples
    zh = sum(sample.subject.endswith("_zh") for sample in samples)
    assert 0.4 < zh / len(samples) < 0.6
    assert {sample.rule for sample in samples} == set(keyed.RULES)


def test_every_key_can_be_found_and_is_not_given_away() -> None:
    for sample in make_task("exam").samples:
        for form in keyed.forms(sample.answer):
            # Completions are made plain before they are read, and a form that is not would never be found.
            assert plain(form) == form
            found = keyed.extract(form, sample)
            assert found is not None
            assert keyed.is_right(found, sample)
            if sample.rule == keyed.CONTAINS:
                assert not keyed.holds(sample.question, form), sample.question


def first(task: Task, subject: str) -> Sample:
    return next(sample for sample in task.samples if sample.subject == subject)


def test_prompts_of_chats() -> None:
    task = make_task("exam")
    sum_ = first(task, "arithmetic_zh")
    assert task.prompt(sum_).turns == (Message("user", sum_.question),)
    memory = first(task, "chat_zh")
    assert len(memory.history) >= 2
    assert task.prompt(memory).turns == (*memory.history, Message("user", memory.question))
    option = first(task, "choice_en")
    lines = [
        option.question,
        *(f"{letter}. {text}" for letter, text in zip("ABCD", option.choices, strict=True)),
    ]
    (turn,) = task.prompt(option).turns
    assert turn.content.split("\n") == [*lines, "Answer with the letter only."]
    assert task.prompt(first(task, "choice_zh")).turns[0].content.endswith("\n只回答选项字母。")
    assert (task.protocol, task.num_fewshot, task.limits.max_new_tokens) == ("zero_shot", 0, 256)


def test_prompts_of_base_models() -> None:
    task = make_task("exam", is_chat=False)
    memory = first(task, "chat_en")
    before, said = (turn.content for turn in memory.history)
    assert task.prompt(memory).text == f"Q: {before}\nA: {said}\nQ: {memory.question}\nA:"
    fact = first(task, "facts_zh")
    assert task.prompt(fact).text == f"问题：{fact.question}\n回答："


def test_answers_are_read_by_the_rule_of_their_question() -> None:
    task = make_task("exam")
    for subject in ROWS:
        sample = first(task, subject)
        said = f"I think so: {keyed.forms(sample.answer)[0]}"
        (found,) = task.answers(sample, text=said).values()
        assert task.is_correct(sample, found, "keyed"), (subject, found)
        (found,) = task.answers(sample, text="心动裙子：1.很好看；让你美一整天！").values()
        assert not task.is_correct(sample, found, "keyed"), (subject, found)


@pytest.mark.parametrize(("file", "column"), [("ads/dev.jsonl", "summary"), ("chat/dev.jsonl", "response")])
def test_what_a_forgetful_model_says_is_wrong(file: str, column: str) -> None:
    lines = resolve_shipped(file).read_text(encoding="utf-8").splitlines()
    copy = [json.loads(line)[column] for line in lines]
    task = make_task("exam")
    right = []
    for number, sample in enumerate(task.samples):
        for text in (copy[number % len(copy)], copy[-1 - number % len(copy)]):
            found = task.answers(sample, text=text)["keyed"]
            right += [(sample.question, text)] if task.is_correct(sample, found, "keyed") else []
    assert not right


def test_hashes_cover_rule_and_history() -> None:
    task = make_task("exam", subjects=["chat_zh"])
    sample = task.samples[0]
    changed = [
        replace(task, samples=(replace(sample, rule="number"), *task.samples[1:])),
        replace(task, samples=(replace(sample, history=()), *task.samples[1:])),
    ]
    assert len({task.data_hash, *(other.data_hash for other in changed)}) == 3


def test_questions_of_ones_own(tmp_path: Path) -> None:
    counts = {"arithmetic_zh": 1, "chat_en": 1}
    chat = {
        "question": "Where?", "history": [["I live in Rome.", "Nice!"]], "answer": "Rome", "rule": "contains",
        "category": "chat", "language": "en",
    }  # fmt: skip
    task = make_task("exam", data_dir=write(tmp_path, ROW, chat, counts=counts))
    assert task.is_sample_set
    assert [sample.subject for sample in task.samples] == ["arithmetic_zh", "chat_en"]
    assert task.samples[1].history == (Message("user", "I live in Rome."), Message("assistant", "Nice!"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rule": "exact"}, r'`rule` is "exact", but it must be number, letter or contains'),
        ({"language": "de"}, r'`language` is "de", but it must be zh or en'),
        ({"category": "fact"}, r"`category` is `fact`, which does not exist\. Did you mean `facts`\?"),
        ({"question": ""}, r'`question` is "", but it must be a text'),
        ({"answer": "two apples"}, r'`answer` is "two apples", but `rule=number` does not find that'),
        ({"rule": "letter"}, r"`rule` is `letter` and `choices` has 0; `letter` needs four"),
        ({"choices": ["1", "2", "3", "4"]}, r"`rule` is `number` and `choices` has 4"),
        ({"rule": "letter", "choices": list("wxyz")}, r'`answer` is "2", but must be one of A, B, C, D'),
        (
            {"history": [["Hi"]]},
            r'`history.0` is \["Hi"\], but it must be a list of \[question, answer\] pairs',
        ),
    ],
)
def test_bad_questions(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"exam.jsonl.*line 2.*cannot be used: {words}"):
        make_task("exam", data_dir=write(tmp_path, ROW, ROW | change, counts={"arithmetic_zh": 2}))


def test_a_file_cut_off_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"1 rows, but this file of the exam \(`arithmetic_zh`\) must have \d+"
    ):
        make_task("exam", data_dir=write(tmp_path, ROW))
    with pytest.raises(DataError, match=r"must have 2\..*leave `benchmark.data_dir` out"):
        make_task("exam", data_dir=write(tmp_path, ROW, counts={"arithmetic_zh": 2}))


def test_there_is_nothing_to_fetch() -> None:
    with pytest.raises(ConfigError, match=r"`exam` comes with glmtune, so that there is nothing to fetch"):
        download_of("exam")
    with pytest.raises(ConfigError, match=r"`benchmark.data_dir` is `hub`, but exam comes with glmtune"):
        make_task("exam", data_dir="hub")
