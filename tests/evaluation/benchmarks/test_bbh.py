"""BIG-Bench Hard: prompts byte for byte, sizes, odd targets, and the official rule."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.benchmarks.benchmark import subject_table
from evaluation.benchmarks.tasks import make_task
from glmtune.errors import DataError
from glmtune.messages import Message

PROMPT = "canary\n-----\nAbout.\n\nQ: 1?\nA: Let's think step by step.\nOne. So the answer is 1."


def test_all_items_are_read(benchmarks_data: Path) -> None:
    task = make_task("bbh", data_dir=benchmarks_data)
    counts = Counter(sample.subject for sample in task.samples)
    assert (len(task.samples), len(counts)) == (6511, 27)
    assert (counts["causal_judgement"], counts["penguins_in_a_table"], counts["snarks"]) == (187, 146, 178)
    assert len({facts.get("task", name) for name, facts in subject_table("bbh").items()}) == 23


@pytest.mark.parametrize("is_chat", [True, False])
def test_cot_prompts_are_the_files_with_the_canary_cut(benchmarks_data: Path, is_chat: bool) -> None:
    task = make_task("bbh", data_dir=benchmarks_data, is_chat=is_chat)
    assert len(task.samples) == 6511
    for sample in task.samples:
        if sample.index % 50:
            continue
        text = (benchmarks_data / f"bbh/cot-prompts/{sample.subject}.txt").read_bytes().decode("utf-8")
        shots = text.split("\n", 2)[2]
        wanted = f"{shots}\n\nQ: {sample.question}\nA: Let's think step by step."
        prompt = task.prompt(sample)
        assert (prompt.turns == (Message("user", wanted),)) if is_chat else (prompt.text == wanted)
        assert "canary" not in wanted
        assert prompt.num_fewshot == 3
    assert (task.num_fewshot, task.limits.max_new_tokens, task.limits.stop) == (3, 512, ("\nQ:",))


def test_fewer_exemplars_keep_description_and_question(benchmarks_data: Path) -> None:
    task = make_task("bbh", data_dir=benchmarks_data, is_chat=False, subjects=["navigate"])
    sample = task.samples[0]
    full = task.prompt(sample).text or ""
    description, first, *_ = full.split("\n\nQ: ")
    end = f"Q: {sample.question}\nA: Let's think step by step."
    assert task.prompt(sample, 1).text == f"{description}\n\nQ: {first}\n\n{end}"
    assert task.prompt(sample, 0).text == f"{description}\n\n{end}"


def test_direct_prompts_have_the_same_questions_with_answers_only(benchmarks_data: Path) -> None:
    task = make_task(
        "bbh",
        protocol="few_shot_direct",
        data_dir=benchmarks_data,
        is_chat=False,
        subjects=["snarks", "navigate"],
    )
    for sample in (task.samples[0], task.samples[-1]):
        text = task.prompt(sample).text or ""
        assert "step by step" not in text
        assert text.endswith(f"\n\nQ: {sample.question}\nA:")
        assert text.count("\nA: ") == 3
    texts = [
        task.prompt(next(s for s in task.samples if s.subject == name)).text
        for name in ("navigate", "snarks")
    ]
    assert "\nA: Yes\n\n" in (texts[0] or "")
    assert "\nA: (A)\n\n" in (texts[1] or "")


def test_perfect_completions_score_everything_and_letters_alone_miss_three(benchmarks_data: Path) -> None:
    task = make_task("bbh", data_dir=benchmarks_data)
    assert len(task.samples) == 6511
    for sample in task.samples:
        found = task.answers(sample, text=f"Some thoughts. So the answer is {sample.answer}.")
        for rule in ("official", "normalized", "loose"):
            assert task.is_correct(sample, found[rule], rule), (sample, rule, found)
    odd = [
        s for s in task.samples if subject_table("bbh")[s.subject]["kind"] == "letter" and s.answer[0] != "("
    ]
    assert sorted(sample.answer for sample in odd) == [
        "Monsters, Inc", "dearth, wind, & fire", "rita, sue and bob poo"
    ]  # fmt: skip


def test_exemplars_answer_in_the_form_of_their_task(benchmarks_data: Path) -> None:
    """The rules read every worked exemplar of every task."""
    from evaluation.benchmarks.bbh import final_answer, read_exemplars
    from evaluation.extraction.bbh import normalized, official
    from evaluation.sample import Sample

    assert len(subject_table("bbh")) == 27
    for name, facts in subject_table("bbh").items():
        description, exemplars = read_exemplars(benchmarks_data / "bbh", name)
        assert description
        assert len(exemplars) == 3
        for shot in exemplars:
            answer = final_answer(shot.answer)
            sample = Sample("bbh", name, 0, shot.question, answer=answer)
            assert official(facts["kind"])(shot.answer, sample) == answer
            found = normalized(facts["kind"])(shot.answer, sample)
            assert found is not None
            assert found.casefold() == answer.casefold()


def test_capital_q_does_not_end_a_completion() -> None:
    task = make_task("bbh", data_dir="sample")
    assert all(stop.startswith("\n") for stop in task.limits.stop)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("About.\n\nQ: 1?", "begins with a canary line and a line of dashes"),
        ("canary\n-----\nAbout.", "no exemplars after the description"),
        ("canary\n-----\nAbout.\n\nQ: 1?\nA: 1", r"an exemplar has no \"A: Let's think step by step\.\""),
        (PROMPT.replace("the answer is", "it is"), "or no 'the answer is'"),
    ],
)
def test_malformed_prompt_files(describe: Callable[..., Path], prompt: str, words: str) -> None:
    items = json.dumps({"examples": [{"input": "1?", "target": "Yes"}]})
    folder = describe(
        {"bbh/navigate.json": items, "cot-prompts/navigate.txt": prompt}, {"test": {"navigate": 1}}
    )
    with pytest.raises(DataError, match=words):
        make_task("bbh", data_dir=folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "no JSON object with `examples`"),
        ('{"examples": [{"input": "1?", "target": 1}]}', "the field `target` is no text"),
        ('{"examples": []}', "0 rows, but this file of bbh must have 1"),
        ("[", "no JSON object with `examples`"),
    ],
)
def test_malformed_items(describe: Callable[..., Path], text: str, words: str) -> None:
    folder = describe(
        {"bbh/navigate.json": text, "cot-prompts/navigate.txt": PROMPT}, {"test": {"navigate": 1}}
    )
    with pytest.raises(DataError, match=words):
        make_task("bbh", data_dir=folder)


def test_final_newline_of_a_prompt_file_does_not_matter(describe: Callable[..., Path]) -> None:
    items = json.dumps({"examples": [{"input": "2?", "target": "Yes"}]})
    folder = describe(
        {"bbh/navigate.json": items, "cot-prompts/navigate.txt": PROMPT + "\n"}, {"test": {"navigate": 1}}
    )
    task = make_task("bbh", data_dir=folder, is_chat=False)
    one = "About.\n\nQ: 1?\nA: Let's think step by step.\nOne. So the answer is 1.\n\n"
    assert task.prompt(task.samples[0]).text == f"{one}Q: 2?\nA: Let's think step by step."
