"""A built-in benchmark asked in a user's own words: system message, template, and what is said of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.own.asking import OwnWords
from evaluation.benchmarks.tasks import make_task
from evaluation.compare.pairing.match import match
from evaluation.compare.pairing.runs import read_run
from evaluation.evaluate import default_run_folder
from evaluation.running.fingerprint import fingerprint
from evaluation.settings import BenchmarkSettings
from glmtune.cli import main
from glmtune.errors import ConfigError, DataError
from glmtune.messages import Message
from tests.evaluation.compare.cases import INT4, write_run
from tests.evaluation.doubles import IDENTITY
from tests.evaluation.doubles import make_task as quiz

DATA = Path(__file__).parents[3] / "data"


def template(folder: Path, text: str) -> Path:
    path = folder / "mine.jinja"
    path.write_text(text, encoding="utf-8")
    return path


def asked(**more: Any):
    return make_task("gsm8k", data_dir="sample", **more)


def test_a_system_message_stands_before_every_turn() -> None:
    task = make_task("ceval", data_dir="sample", system="只回答字母。")
    plain = make_task("ceval", data_dir="sample")
    sample = task.samples[0]
    assert task.prompt(sample).turns == (Message("system", "只回答字母。"), *plain.prompt(sample).turns)
    second = task.extraction_prompt(sample, "想一想")
    assert second.turns == (
        Message("system", "只回答字母。"),
        *plain.extraction_prompt(sample, "想一想").turns,
    )
    assert task.data_hash == plain.data_hash
    assert task.prompt_hash != plain.prompt_hash


def test_a_template_writes_the_question_anew(tmp_path: Path) -> None:
    path = template(
        tmp_path,
        "[{{ subject }}] {{ question }}{% for l in letters %} {{ l }}={{ options[loop.index0] }}{% endfor %}\n",
    )
    task = make_task("mmlu", data_dir="sample", protocol="zero_shot_cot", template=path)
    sample = task.samples[0]
    options = " ".join(f"{letter}={text}" for letter, text in zip("ABCD", sample.choices, strict=True))
    assert task.prompt(sample).turns == (Message("user", f"[{sample.subject}] {sample.question} {options}"),)
    base = make_task("mmlu", data_dir="sample", protocol="zero_shot_cot", template=path, is_chat=False)
    assert base.prompt(sample).text == f"[{sample.subject}] {sample.question} {options}"


def test_exemplars_stay(tmp_path: Path) -> None:
    around = template(tmp_path, "<{{ prompt }}>")
    task, plain = asked(template=around), asked()
    sample = task.samples[0]
    assert task.prompt(sample).turns[0].content == f"<{plain.prompt(sample).turns[0].content}>"
    assert task.prompt(sample, 2).turns[0].content == f"<{plain.prompt(sample, 2).turns[0].content}>"
    assert task.prompt(sample, 2).num_fewshot == 2
    # Exemplars that are turns of their own are left alone, whatever the last one says.
    bare = template(tmp_path, "{{ question }}?")
    turns = make_task("mmlu", data_dir="sample", protocol="few_shot_direct", template=bare)
    whole = make_task("mmlu", data_dir="sample", protocol="few_shot_direct")
    first = turns.samples[0]
    assert turns.prompt(first).turns[:-1] == whole.prompt(first).turns[:-1]
    assert turns.prompt(first).turns[-1].content == f"{first.question}?"
    with pytest.raises(ConfigError, match=r"does not name `prompt`.*8 exemplars.*would be lost"):
        asked(template=bare)
    assert asked(template=bare, num_fewshot=0).prompt(sample).turns[0].content == f"{sample.question}?"


def test_a_text_that_is_cut_is_asked_in_the_same_words(tmp_path: Path) -> None:
    path = template(tmp_path, "<{{ prompt }}>")
    task = make_task("longbench", data_dir="sample", template=path, system="Be brief.")
    assert task.prepared.shorten is not None
    system, asked_in_part = task.prepared.shorten(task.samples[0], 10).turns
    assert system == Message("system", "Be brief.")
    assert asked_in_part.content.startswith("<")
    assert len(asked_in_part.content) < len(task.prompt(task.samples[0]).turns[1].content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ quest }}", r"it names `quest`, but there are prompt, question"),
        ("{{ question", "it is no Jinja template"),
        ("What?", "it names neither `prompt` nor `question`"),
        ("{{ prompt.__class__.__mro__ }}", "SecurityError"),
        ("{{ prompt }}{{ 'x' * 2000000 }}", "renders 2,0"),
        ("{{ prompt }}{% include 'other' %}", "cannot be rendered"),
    ],
    ids=["name", "syntax", "no question", "reaches out", "too long", "files"],
)
def test_a_template_that_cannot_be_asked(text: str, message: str, tmp_path: Path) -> None:
    def ask() -> None:
        task = asked(template=template(tmp_path, text))
        task.prompt(task.samples[0])

    with pytest.raises(DataError, match=message) as caught:
        ask()
    assert "mine.jinja" in str(caught.value)


def test_what_would_not_be_obeyed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a base model continues plain text"):
        asked(system="Be brief.", is_chat=False)
    with pytest.raises(ConfigError, match=r"`benchmark.system` is empty"):
        BenchmarkSettings(system=" ")
    with pytest.raises(DataError, match=r"none.jinja: this file of `benchmark.template` is missing"):
        asked(template=tmp_path / "none.jinja")
    quiz_file = str(DATA / "own_benchmark" / "quiz.yaml")
    for more in ({"system": "Be brief."}, {"template": template(tmp_path, "{{ question }}")}):
        with pytest.raises(ConfigError, match=r"says itself how its questions are asked"):
            make_task(quiz_file, **more)
    assert not OwnWords().is_given


def test_title_fingerprint_and_folder_name_it(tmp_path: Path) -> None:
    path = template(tmp_path, "{{ prompt }}")
    task = asked(system="Be brief.", template=path)
    assert task.own_prompt_words == ("own system message", "template mine.jinja")
    values = fingerprint(task, IDENTITY, 2048)
    assert values["own_prompt"]["system"] == "Be brief."
    assert len(values["own_prompt"]["template_hash"]) == 16
    plain = fingerprint(asked(), IDENTITY, 2048)
    assert "own_prompt" not in plain
    # A template that says the same is another way to ask all the same, as its words may be changed.
    same_words = fingerprint(asked(template=path), IDENTITY, 2048)
    assert same_words["prompt_hash"] == plain["prompt_hash"]
    folders = {default_run_folder(each) for each in (values, plain, same_words)}
    assert len(folders) == 3


def test_runs_in_other_words_are_not_compared(tmp_path: Path) -> None:
    task = quiz()
    spoken = dataclasses.replace(task, own_prompt={"system": "Be brief."})
    plain = read_run(write_run(tmp_path / "plain", task))
    own = read_run(write_run(tmp_path / "own", spoken, INT4))
    assert own.results["title"].startswith("Quiz val, test, own system message: ")
    assert own.results["own_prompt"] == {"system": "Be brief."}
    with pytest.raises(DataError, match=r"differ in prompts \(own_prompt: null and .*`benchmark.system`"):
        match(plain, own)
    pair = match(own, read_run(write_run(tmp_path / "other", spoken, IDENTITY, wrong=(1,))))
    assert not pair.is_comparable
    assert pair.what == "Quiz val, test, own system message"


def test_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = DATA / "own_benchmark" / "short_answer.jinja"
    words = ["benchmark=gsm8k", "protocol=zero_shot_cot", "benchmark.data_dir=sample", "benchmark.limit=2"]
    words += ["benchmark.system=You solve word problems.", f"benchmark.template={path}", "max_new_tokens=8"]
    assert main(["eval", *words, f"output_dir={tmp_path / 'run'}"]) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    said = "zero_shot_cot, own system message, template short_answer.jinja: glm-tiny"
    assert said in results["title"]
    assert results["own_prompt"]["template"] == "short_answer.jinja"
    assert "benchmark.template=" in shown.rpartition("next: ")[2]
    # Another template is another run.
    other = template(tmp_path, "{{ question }} Now!")
    again = [
        f"benchmark.template={other}" if word.startswith("benchmark.template") else word for word in words
    ]
    assert main(["eval", *again, f"output_dir={tmp_path / 'run'}"]) == 2
    assert "own_prompt.template" in capsys.readouterr().err
