"""LongBench: prompts of the files that publish them, lengths by data set, texts that lose their middle, grades."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.benchmarks.further.longbench import without_middle
from evaluation.benchmarks.tasks import make_task
from evaluation.evaluate import evaluate_model
from evaluation.running.fitting import fit_prompt
from evaluation.running.runner import run_task
from evaluation.running.same_questions import SameQuestions
from evaluation.sample import Completion, Prompt
from evaluation.task import hash_prompt
from glmtune.errors import DataError
from glmtune.terminal.console import Console
from tests.evaluation.doubles import TableBackend


class Reader(TableBackend):
    """Answers every question with the same words."""

    def generate(self, prompts, limits):
        self.calls.append(("generate", len(prompts), limits))
        for place, prompt in enumerate(prompts):
            self.asked.append(text_of(prompt))
            yield place, Completion("the village of Senn", "eos", self.count_tokens(prompt), 5)


def text_of(prompt: Prompt) -> str:
    return prompt.text if prompt.text is not None else prompt.turns[-1].content


def test_prompts_and_lengths_are_those_of_the_published_files() -> None:
    task = make_task("longbench", data_dir="sample", is_chat=False)
    sample = next(sample for sample in task.samples if sample.subject == "dureader")
    text = task.prompt(sample).text
    assert text is not None
    assert text.startswith("根据下面的文字回答问题。\n\n先烧一壶水")
    assert text.endswith("\n\n问题：怎样泡茶？\n回答：")
    assert [task.max_new_tokens(each) for each in task.samples] == [48, 48, 48, 24, 24, 24, 96, 96]
    assert task.limits.max_new_tokens == 96
    longer = make_task("longbench", data_dir="sample", max_new_tokens=7)
    assert {longer.max_new_tokens(each) for each in longer.samples} == {7}


def test_answers_are_graded_against_the_nearest_reference() -> None:
    task = make_task("longbench", data_dir="sample")
    by_subject = {sample.subject: sample for sample in reversed(task.samples)}
    hotpot = by_subject["hotpotqa"]
    assert task.grade(hotpot, task.answers(hotpot, text="Senn.")["overlap"], "overlap") == 1.0
    assert task.grade(hotpot, "the village of Senn", "overlap") == 1.0
    assert task.grade(hotpot, "a lake", "overlap") == 0.0
    assert task.grade(hotpot, None, "overlap") == 0.0
    assert task.answers(hotpot, text=" ") == {"overlap": None}
    chinese = by_subject["multifieldqa_zh"]
    assert task.grade(chinese, "一九二三年。", "overlap") == 1.0
    assert 0 < (task.grade(by_subject["dureader"], "先烧水。", "overlap") or 0) < 1


def test_a_text_that_does_not_fit_loses_its_middle() -> None:
    task = make_task("longbench", data_dir="sample", subjects=["hotpotqa"])
    backend = Reader(context=600)
    sample = task.samples[1]
    whole = text_of(task.prompt(sample))
    asked = fit_prompt(task, sample, backend)
    assert asked.prompt is not None
    cut = text_of(asked.prompt)
    assert 600 - 24 - 8 <= backend.count_tokens(asked.prompt) <= 600 - 24
    assert asked.max_new_tokens == 24
    assert cut.startswith(whole[:200])
    assert cut.endswith(whole[-250:])
    assert len(cut) < len(whole)
    fits = fit_prompt(task, task.samples[2], Reader(context=10_000))
    assert fits.prompt == task.prompt(task.samples[2])
    nothing = fit_prompt(task, sample, Reader(context=60))
    assert nothing.prompt is None


@pytest.mark.parametrize(("count", "left"), [(8, "abcdefgh"), (4, "abgh"), (3, "abh"), (1, "a"), (0, "")])
def test_what_is_left_of_a_text(count: int, left: str) -> None:
    assert without_middle("abcdefgh", count) == left


def test_a_run_goes_on_and_says_how_many_were_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = make_task("longbench", data_dir="sample", subjects=["hotpotqa"], limit=1)
    run_task(few, Reader(context=600), tmp_path / "run")
    all_of_it = make_task("longbench", data_dir="sample", subjects=["hotpotqa"])
    backend = Reader(context=600)
    done = evaluate_model(all_of_it, backend, Console(), output_dir=tmp_path / "run")
    assert done is not None
    assert len(backend.asked) == 2
    assert done.result.num_shortened == 2
    assert "2 prompts lost the middle of their text to fit the model's context" in capsys.readouterr().out
    values = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert values["is_graded"] is True
    assert values["accuracy_micro"] == pytest.approx(1 / 3, abs=0.05)
    # With room for more, the same questions have other prompts.
    same = SameQuestions(all_of_it, Reader(context=10_000))
    assert [same.is_same(judged.answer) for judged in done.result.judgements] == [False, False, True]
    assert hash_prompt(all_of_it.prompt(all_of_it.samples[2])) == done.result.judgements[2].answer.prompt_hash


PROMPT = json.dumps({"musique": "T: {context}\nQ: {input}\nA:"})
LENGTH = json.dumps({"musique": 32})
ROW = json.dumps({"input": "Who?", "context": "Ann {input} sang.", "answers": ["Ann"]}) + "\n"


def test_braces_in_a_text_are_no_places(describe: Callable[..., Path]) -> None:
    folder = describe(
        {
            "data/musique.jsonl": ROW * 200,
            "config/dataset2prompt.json": PROMPT,
            "config/dataset2maxlen.json": LENGTH,
        }
    )
    task = make_task("longbench", data_dir=folder, is_chat=False, subjects=["musique"])
    assert len(task.samples) == 200
    assert task.prompt(task.samples[0]).text == "T: Ann {input} sang.\nQ: Who?\nA:"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("data/musique.jsonl", ROW * 3, r"3 rows, but this file of longbench \(`musique`\) must have 200"),
        ("data/musique.jsonl", ROW.replace('["Ann"]', "[]") * 200, "line 1: `answers` is"),
        ("config/dataset2prompt.json", "{}", "`musique` is null, but must be a str"),
        ("config/dataset2prompt.json", '{"musique": "Q: {input}"}', "must name {context}"),
        ("config/dataset2maxlen.json", '{"musique": true}', "must be a int"),
        ("config/dataset2maxlen.json", '{"musique": 0}', "may have 1 to 4096 tokens"),
        ("config/dataset2maxlen.json", "[", "no JSON"),
    ],
    ids=["rows", "answers", "prompt", "no context", "length", "no length", "JSON"],
)
def test_files_that_cannot_be_used(file: str, text: str, message: str, describe: Callable[..., Path]) -> None:
    folder = describe(
        {
            "data/musique.jsonl": ROW * 200,
            "config/dataset2prompt.json": PROMPT,
            "config/dataset2maxlen.json": LENGTH,
        }
    )
    describe({file: text})
    with pytest.raises(DataError, match=message):
        make_task("longbench", data_dir=folder, subjects=["musique"])
