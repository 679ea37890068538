"""The base's answers are those of greedy generation, and what is written is what is read."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from glmtune.errors import CheckpointError, ConfigError
from glmtune.loading import load_tokenizer
from glmtune.messages import Message
from glmtune.models.load import load_official
from glmtune.models.templates.renderer import template_for
from glmtune.retention.base_answers import BaseAnswers, make_answers, read_answers, write_answers
from glmtune.retention.prompts import Prompt

QUESTIONS = ("你好，今天想去哪里？", "How many apples are left?", "1 + 2 =", "写一段广告。")


def asked(*questions):
    return [Prompt((Message("user", question),), "chat", "zh") for question in questions]


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_official(tiny_base, device="cpu"), load_tokenizer(tiny_base)


@pytest.fixture(scope="module")
def answers(base) -> BaseAnswers:
    return make_answers(*base, asked(*QUESTIONS), max_new_tokens=12)


@torch.no_grad()
def greedy(model, ids, stop_ids, limit):
    """Take the likeliest token again and again, by whole forward passes."""
    made = []
    while len(made) < limit and not (made and made[-1] in stop_ids):
        logits = model(input_ids=torch.tensor([[*ids, *made]])).logits
        made.append(int(logits[0, -1].argmax()))
    return made


def test_answers_are_the_likeliest_tokens_after_the_bare_prompt(base, answers):
    model, tokenizer = base
    template = template_for(tokenizer)
    for prompt, ids, answer in zip(answers.prompts, answers.prompt_ids, answers.answer_ids, strict=True):
        assert ids == template.encode_prompt(tokenizer, prompt.messages)
        assert answer == greedy(model, ids, template.stop_ids(tokenizer), 12)


def test_the_token_that_ended_an_answer_is_part_of_it(base, answers, monkeypatch):
    _, tokenizer = base
    third = answers.answer_ids[0][2]
    monkeypatch.setattr(type(template_for(tokenizer)), "stop_ids", lambda self, tokenizer: (third, 9))
    stopped = make_answers(*base, asked(QUESTIONS[0]), max_new_tokens=12)
    place = answers.answer_ids[0].index(third)
    assert stopped.answer_ids[0] == answers.answer_ids[0][: place + 1]


def test_mode_and_random_numbers_stay_as_they_were(base):
    model, tokenizer = base
    model.train()
    before = torch.get_rng_state()
    make_answers(model, tokenizer, asked(QUESTIONS[0]), max_new_tokens=3)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    model.eval()


def test_signs_that_part_lines_elsewhere_stay_in_an_answer(base, answers, tmp_path):
    """U+2028, U+0085 and the like are written as they are, and end no line of JSON."""
    text = "a\u2028b\u2029c\x85d\x1ce\rf"
    prompts = [Prompt((Message("user", f"{each}{text}"),), "chat", "zh") for each in QUESTIONS]
    asked_so = dataclasses.replace(answers, prompts=prompts)
    write_answers(tmp_path / "a.jsonl", asked_so)
    assert read_answers(tmp_path / "a.jsonl", base[1]) == asked_so


def test_a_prompt_without_room_for_an_answer_is_left_out(base):
    made = make_answers(*base, asked("苹果" * 300, *QUESTIONS[1:]), max_new_tokens=3)
    assert [prompt.messages[0].content for prompt in made.prompts] == list(QUESTIONS[1:])
    with pytest.raises(
        ConfigError, match=r"None of the 1 general prompts fits .* 256 tokens with an answer of 3"
    ):
        make_answers(*base, asked("苹果" * 300), max_new_tokens=3)


def test_what_is_written_is_what_is_read(base, answers, tmp_path):
    file = tmp_path / "retention" / "base.jsonl"
    write_answers(file, answers)
    found = read_answers(file, base[1])
    assert found == answers
    assert found.fingerprint == answers.fingerprint
    assert QUESTIONS[0] in file.read_text(encoding="utf-8")


def test_every_part_counts_for_the_fingerprint(answers):
    others = [
        dataclasses.replace(answers, prompt_ids=[[1], *answers.prompt_ids[1:]]),
        dataclasses.replace(answers, answer_ids=[[1], *answers.answer_ids[1:]]),
        dataclasses.replace(answers, texts=["x", *answers.texts[1:]]),
        dataclasses.replace(answers, prompts=[Prompt((Message("user", "x"),)), *answers.prompts[1:]]),
    ]
    assert len({each.fingerprint for each in (answers, *others)}) == 5


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda lines: lines[:-1], r"not whole: it holds 3 rows of 4"),
        (lambda lines: [*lines[:2], lines[2].replace("zh", "en"), *lines[3:]], r"cannot be read: damaged"),
        (lambda lines: [], r"cannot be read"),
    ],
)
def test_a_damaged_file_is_refused(base, answers, tmp_path, damage, words):
    file = tmp_path / "base.jsonl"
    write_answers(file, answers)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(damage(lines)), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"base\.jsonl.*{words}.*resume=never"):
        read_answers(file, base[1])


def test_a_missing_file_is_refused(base, tmp_path):
    with pytest.raises(CheckpointError, match=r"base\.jsonl is absent: .* made once"):
        read_answers(tmp_path / "base.jsonl", base[1])


def test_answers_of_another_tokenizer_are_refused(base, answers, tmp_path):
    file = tmp_path / "base.jsonl"
    write_answers(file, dataclasses.replace(answers, texts=["other text", *answers.texts[1:]]))
    with pytest.raises(CheckpointError, match=r"another tokenizer"):
        read_answers(file, base[1])
