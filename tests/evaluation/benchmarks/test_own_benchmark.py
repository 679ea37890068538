"""Benchmarks described in a YAML file: what they ask, what they read, and every mistake with its line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation.benchmarks.own.benchmark import own_benchmark, reads_files_only
from evaluation.benchmarks.own.reading import ANY
from evaluation.benchmarks.tasks import make_task
from evaluation.sample import ChoiceScores
from evaluation.task import CHOICES, GENERATE_THEN_CHOICES, Task
from glmtune.cli import main
from glmtune.errors import ConfigError, DataError, GlmtuneError
from glmtune.messages import Message

DATA = Path(__file__).parents[3] / "data"
ROWS: list[dict[str, Any]] = [
    {"q": "1 + 1?", "a": "2", "field": "sums"},
    {"q": "Capital of France?", "a": "Paris", "field": "places"},
    {"q": "2 + 2?", "a": "4", "field": "sums"},
]
OPTIONS: list[dict[str, Any]] = [
    {"q": "Hot?", "x": "ice", "y": "fire", "key": "B"},
    {"q": "Cold?", "x": "ice", "y": "fire", "key": 0},
    {"q": "Wet?", "x": "rain", "y": "sand", "key": "rain"},
]
BASE: dict[str, Any] = {
    "title": "Mine",
    "files": {"test": "rows.jsonl"},
    "question": "{{ q }}",
    "answer": "a",
    "prompt": "Q: {{ question }}\nA:\n",
}
LETTERS: dict[str, Any] = {
    **BASE,
    "answer": "key",
    "options": ["x", "y"],
    "prompt": "{{ q }}{% for letter in letters %}\n{{ letter }}. {{ options[loop.index0] }}{% endfor %}",
}


def write(folder: Path, about: dict[str, Any], rows: list[dict[str, Any]] = ROWS, **more: Any) -> Path:
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({**about, **more}, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return file


def made(file: Path, **more: Any) -> Task:
    return make_task(str(file), **more)


def texts(task: Task) -> list[str]:
    return [task.prompt(sample).text or task.prompt(sample).turns[-1].content for sample in task.samples]


def test_a_built_in_protocol_can_be_described() -> None:
    ours = make_task("gsm8k", protocol="zero_shot_cot", data_dir=DATA / "gsm8k_sample")
    task = made(DATA / "own_benchmark" / "described_gsm8k.yaml")
    assert [task.prompt(each) for each in task.samples] == [ours.prompt(each) for each in ours.samples]
    assert [each.answer for each in task.samples] == [each.answer for each in ours.samples]
    assert task.limits == ours.limits
    said = "12 + 7 = 19, so the answer is 19."
    sample, theirs = task.samples[0], ours.samples[0]
    assert task.answers(sample, text=said)["number"] == ours.answers(theirs, text=said)["decimal"]
    right = f"It is {sample.answer}."
    assert task.is_correct(sample, task.answers(sample, text=right)["number"], "number")


def test_a_question_is_asked_as_described(tmp_path: Path) -> None:
    task = made(write(tmp_path, BASE), is_chat=False)
    assert texts(task) == ["Q: 1 + 1?\nA:", "Q: Capital of France?\nA:", "Q: 2 + 2?\nA:"]
    assert (task.benchmark, task.title, task.protocol_version) == ("mine", "Mine", "own/1")
    assert not task.is_sample_set
    assert {sample.subject for sample in task.samples} == {"mine"}
    chat = made(write(tmp_path, BASE))
    assert chat.prompt(chat.samples[0]).turns == (Message("user", "Q: 1 + 1?\nA:"),)


def test_subjects_and_groups(tmp_path: Path) -> None:
    groups = {"all of it": ["sums", "places"]}
    task = made(write(tmp_path, BASE, subject="field", groups=groups, average="macro"))
    assert [(sample.subject, sample.index) for sample in task.samples] == [
        ("sums", 0),
        ("sums", 1),
        ("places", 0),
    ]
    assert task.headline == "accuracy_macro"
    assert task.categories == {"sums": "all of it", "places": "all of it"}
    few = made(write(tmp_path, BASE, subject="field"), subjects=["places"])
    assert [sample.answer for sample in few.samples] == ["Paris"]
    assert few.is_partial


def test_options_and_keys_of_every_form(tmp_path: Path) -> None:
    task = made(write(tmp_path, LETTERS, OPTIONS, kind="choices"), is_chat=False)
    assert [sample.answer for sample in task.samples] == ["B", "A", "A"]
    assert (task.kind, task.choices) == (CHOICES, (" A", " B"))
    assert texts(task)[0] == "Hot?\nA. ice\nB. fire"
    assert task.answers(task.samples[0], scores=ChoiceScores((-2.0, -1.0), 9)) == {"official": "B"}
    listed = [{"q": "Hot?", "all": ["ice", "fire"], "key": "fire"}]
    task = made(write(tmp_path, LETTERS, listed, options="all"))
    assert (task.samples[0].choices, task.samples[0].answer) == (("ice", "fire"), "B")
    assert task.answers(task.samples[0], text="The answer is B.") == {"letter": "B"}


def test_more_than_four_options(tmp_path: Path) -> None:
    about = {
        **LETTERS,
        "options": "all",
        "extract": {"rule": "letter", "tests": [{"text": "It is G.", "finds": "G"}]},
    }
    rows = [
        {"q": "Seven?", "all": [f"n{number}" for number in range(7)], "key": "G"},
        {"q": "Two?", "all": ["n0", "n1"], "key": 1},
    ]
    task = made(write(tmp_path, about, rows))
    assert [sample.answer for sample in task.samples] == ["G", "B"]
    assert texts(task)[0].endswith("\nF. n5\nG. n6")
    assert task.answers(task.samples[0], text="I think it is F. No, the answer is G.") == {"letter": "G"}
    assert task.answers(task.samples[1], text="The answer is G.") == {"letter": None}
    ten = [{"q": "Ten?", "all": list("abcdefghij"), "key": "j"}] * 2
    scored = made(write(tmp_path, {**LETTERS, "options": "all", "kind": "choices"}, ten), is_chat=False)
    assert scored.choices == tuple(f" {letter}" for letter in "ABCDEFGHIJ")
    logprobs = tuple(-1.0 if place == 9 else -2.0 for place in range(10))
    assert scored.answers(scored.samples[0], scores=ChoiceScores(logprobs, 9)) == {"official": "J"}
    columns = {**LETTERS, "options": ["a", "b", "c", "d", "e"], "kind": "choices"}
    five = [{"q": "Five?", **dict.fromkeys("abcde", "x"), "key": "E"}]
    assert made(write(tmp_path, columns, five)).samples[0].answer == "E"


@pytest.mark.parametrize(
    ("score", "key", "said", "grade"),
    [
        ("rouge_l", "我 喜欢 苹果", "我 喜欢 香蕉", 2 / 3),
        ("rouge_l", "苹果", "苹果", 1.0),
        ("bleu", "河边有一座桥", "河边有一座桥", 1.0),
        ("f1", "a lake", "The lake.", 1.0),
        ("f1", ["a lake", "a pond"], "pond", 1.0),
        ("f1", "a lake", "sea", 0.0),
    ],
    ids=["rouge_l", "rouge_l whole", "bleu", "f1", "f1 of several", "f1 of none"],
)
def test_graded_scores(score: str, key: Any, said: str, grade: float, tmp_path: Path) -> None:
    task = made(write(tmp_path, BASE, [{"q": "?", "a": key}], score=score))
    sample = task.samples[0]
    found = task.answers(sample, text=said)["whole"]
    assert task.is_graded("whole")
    assert task.grade(sample, found, "whole") == pytest.approx(grade, abs=1e-4)
    assert task.is_correct(sample, found, "whole") is (grade == 1.0)
    assert task.grade(sample, None, "whole") == 0.0
    assert f"graded: {score}" in task.rules["whole"].about


def test_both_ways_at_once(tmp_path: Path) -> None:
    second = "{{ prompt }}\n{{ completion }}\nSo the letter is"
    task = made(write(tmp_path, LETTERS, OPTIONS, kind="both", second_prompt=second))
    assert task.kind == GENERATE_THEN_CHOICES
    sample = task.samples[0]
    asked = task.extraction_prompt(sample, "Fire is.").turns[-1].content
    assert asked == "Hot?\nA. ice\nB. fire\nFire is.\nSo the letter is"
    read = task.answers(sample, text="B", scores=ChoiceScores((-1.0, -2.0), 9))
    assert read == {"official": "A", "letter": "B"}


def test_examples_before_a_question(tmp_path: Path) -> None:
    rows = [{"q": f"{n} + 0?", "a": str(n), "field": field} for n in range(3) for field in ("sums", "places")]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {"test": "rows.jsonl", "dev": "dev.jsonl"}
    few_shot = {"split": "dev", "number": 2}
    task = made(write(tmp_path, BASE, files=files, few_shot=few_shot, subject="field"), is_chat=False)
    assert texts(task)[0] == "Q: 0 + 0?\nA: 0\n\nQ: 1 + 0?\nA: 1\n\nQ: 1 + 1?\nA:"
    assert task.num_fewshot == 2
    assert task.prompt(task.samples[0], 1).num_fewshot == 1
    chat = made(write(tmp_path, BASE, files=files, few_shot=few_shot, subject="field"))
    assert [turn.role for turn in chat.prompt(chat.samples[0]).turns] == ["user", "assistant"] * 2 + ["user"]
    alone = made(write(tmp_path, BASE, files=files, few_shot=few_shot), is_chat=False)
    assert texts(alone)[0].startswith("Q: 0 + 0?\nA: 0\n\nQ: 0 + 0?\nA: 0\n\n")
    with pytest.raises(ConfigError, match="stand among"):
        made(write(tmp_path, BASE, files={"test": "rows.jsonl", "dev": "rows.jsonl"}, few_shot=few_shot))


def test_an_example_and_a_question_alike_but_for_their_columns(tmp_path: Path) -> None:
    """Both are the first of their file and ask the same words, as choices often do."""
    rows = [{"q": "Which is right?", "x": name, "key": "A", "y": "no"} for name in ("asked", "shown")]
    (tmp_path / "dev.jsonl").write_text(json.dumps(rows[1]), encoding="utf-8")
    about = {**LETTERS, "prompt": "{{ q }} {{ x }}", "files": {"test": "rows.jsonl", "dev": "dev.jsonl"}}
    task = made(write(tmp_path, about, rows[:1], few_shot={"split": "dev", "number": 1}), is_chat=False)
    assert texts(task) == ["Which is right? shown A\n\nWhich is right? asked"]


def test_a_run_of_others_sends_nobody_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", None)
    assert not reads_files_only(write(tmp_path, BASE, files={"test": "hub:me/mine"}))
    assert reads_files_only(write(tmp_path, BASE))


def test_turns(tmp_path: Path) -> None:
    about = {name: value for name, value in BASE.items() if name != "prompt"}
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{{ q }} ({{ field }})"}]
    file = write(tmp_path, about, turns=turns)
    task = made(file)
    assert task.prompt(task.samples[0]).turns == (
        Message("system", "Be brief."),
        Message("user", "1 + 1? (sums)"),
    )
    with pytest.raises(ConfigError, match=r"`turns`, but a base model continues plain text"):
        made(file, is_chat=False)


@pytest.mark.parametrize(
    ("score", "key", "said", "right"),
    [
        ("exact", "Paris", "Paris", True),
        ("exact", "Paris", "paris", False),
        ("ignore_case", "Paris", "paris.", True),
        ("number", "1,200", "1200.0", True),
        ("number", "3", "4", False),
        ("any_of", ["Rome", "Roma"], "roma", True),
        ("any_of", ["Rome", "Roma"], "Rom", False),
    ],
)
def test_scores(score: str, key: Any, said: str, right: bool, tmp_path: Path) -> None:
    rule = {"rule": "number" if score == "number" else "whole"}
    task = made(write(tmp_path, BASE, [{"q": "?", "a": key}], score=score, extract=rule))
    sample = task.samples[0]
    assert sample.answer == (ANY.join(key) if isinstance(key, list) else key)
    name = next(iter(task.rules))
    assert task.is_correct(sample, task.answers(sample, text=said)[name], name) is right


@pytest.mark.parametrize(
    ("extract", "said", "found"),
    [
        ({"rule": "first_line"}, "\n 4 \nas 2 + 2", "4"),
        ({"rule": "last_line"}, "as 2 + 2\n4\n", "4"),
        ({"rule": "whole"}, "  ", None),
        ({"pattern": r"result: (\w+)"}, "result: a, no, result: b", "b"),
        ({"pattern": r"result: (\w+)"}, "none", None),
        ({"pattern": r"(?:(a+)+)+$"}, "a" * 60 + "!", None),  # takes for ever, and is given a second
    ],
)
def test_how_answers_are_read(extract: dict[str, str], said: str, found: str | None, tmp_path: Path) -> None:
    task = made(write(tmp_path, BASE, extract=extract))
    assert list(task.answers(task.samples[0], text=said).values()) == [found]


def test_another_way_to_read_is_another_version(tmp_path: Path) -> None:
    def version(**more: Any) -> int:
        task = made(write(tmp_path, BASE, **more))
        return next(iter(task.rules.values())).version

    assert version() == version(extract={"rule": "whole"})
    others = {version(), version(score="ignore_case"), version(extract={"pattern": "(a)"})}
    assert len(others) == 3


def test_files_of_all_forms_ask_the_same(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    expected = texts(made(write(tmp_path, BASE)))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with (tmp_path / f"rows{suffix}").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for suffix in (".json", ".csv", ".tsv", ".parquet"):
        assert texts(made(write(tmp_path, BASE, files={"test": f"rows{suffix}"}))) == expected


def test_rows_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(place: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((place, config, split))
        return ROWS

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name in ("hub:me/mine", "hub:me/mine:val", "hub:me/mine:easy:val"):
        assert len(made(write(tmp_path, BASE, files={"test": name})).samples) == 3
    assert asked == [("me/mine", None, "test"), ("me/mine", None, "val"), ("me/mine", "easy", "val")]


GOOD = """title: Mine
files: {test: rows.jsonl}
answer: a
question: "{{ q }}"
licence: mine
prompt: "Q: {{ question }}"
average: micro
"""
MISTAKES = {
    "a key misspelt": (GOOD + "max_new_token: 3\n", 8, ["`max_new_token`", "Did you mean `max_new_tokens`"]),
    "a key misspelt inside": (
        GOOD + "extract:\n  rule: whole\n  test: []\n",
        10,
        ["`extract.test`", "Did you mean `tests`"],
    ),
    "a key left out": (GOOD.replace("title: Mine\n", ""), 1, ["`title` is missing"]),
    "no rule of that name": (GOOD + "extract:\n  rule: letters\n", 9, ["`extract.rule`", "'letter'"]),
    "a number that is a text": (
        GOOD + "max_new_tokens: many\n",
        8,
        ['`max_new_tokens` is "many"', "integer"],
    ),
    "no YAML": (GOOD + "stop: [a\n", 9, ["no YAML"]),
    "a list at the top": ("- 1\n", 1, ["keys were expected"]),
    "prompt and turns": (
        GOOD + "turns:\n  - {role: user, content: x}\n",
        1,
        ["Needs `prompt` or `turns`, and not both"],
    ),
    "choices without options": (GOOD + "kind: choices\n", 1, ["needs `options`"]),
    "limits without an answer": (
        GOOD + "kind: choices\noptions: [a, q]\nmax_new_tokens: 5\n",
        1,
        ["generates nothing"],
    ),
    "letters by their number": (GOOD + "options: [a, q]\nscore: number\n", 1, ["make every key a letter"]),
    "too few examples": (
        GOOD.replace("rows.jsonl}", "rows.jsonl, dev: rows.jsonl}") + "few_shot: {split: dev, number: 9}\n",
        8,
        ["`few_shot.number` is 9, but `dev` has 3 rows"],
    ),
    "a split that is none": (GOOD + "few_shot: {split: dev}\n", 1, ["`few_shot.split` is `dev`", "test"]),
    "a template that is none": (GOOD.replace("Q: {{ question", "Q: {% question"), 6, ["`prompt`", "Syntax"]),
    "a column that is none": (
        GOOD.replace("{{ q }}", "{{ quest }}"),
        4,
        ["`question`", "'quest' is undefined"],
    ),
    "a template that reaches out": (
        GOOD.replace("{{ q }}", "{{ q.__class__.__mro__ }}"),
        4,
        ["`question`", "SecurityError"],
    ),
    "no expression": (GOOD + "extract:\n  pattern: '(a'\n", 8, ["no regular expression"]),
    "no group": (GOOD + "extract:\n  pattern: 'a'\n", 8, ["has no group"]),
    "a test that fails": (
        GOOD + "extract:\n  rule: whole\n  tests:\n    - {text: a, finds: b}\n",
        8,
        ["`extract.tests[0]`", "finds 'a'"],
    ),
    "a group of nobody": (GOOD + "groups: {mine: [other]}\n", 8, ["`groups.mine` names `other`"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_line(name: str, tmp_path: Path) -> None:
    text, line, words = MISTAKES[name]
    file = write(tmp_path, BASE)
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        texts(made(file))
    assert f"mine.yaml, line {line}: " in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("about", "rows", "words"),
    [
        (BASE, [*ROWS, {"q": "x"}], ["rows.jsonl, line 4", "no `a`", "`answer`"]),
        (BASE, [{"q": "x", "a": " "}], ["rows.jsonl, line 1", "`a` is empty"]),
        (BASE, [{"q": "x", "a": ["y"]}], ["rows.jsonl, line 1", "`score: any_of`"]),
        (LETTERS, [*OPTIONS, {**OPTIONS[0], "key": "C"}], ["line 4", "one of A, B", "from 0 to 1"]),
        ({**LETTERS, "options": "x"}, OPTIONS, ["line 1", "list of 2 to 26 options"]),
        (
            {**LETTERS, "options": "o", "kind": "choices"},
            [{"q": "", "o": ["a", "b", "c"], "key": 0}, {"q": "", "o": ["a", "b"], "key": 0}],
            ["line 2", "2 options, but others have 3", "`kind: choices`"],
        ),
        ({**BASE, "files": {"test": "none.jsonl"}}, ROWS, ["none.jsonl", "missing", "relative to the YAML"]),
        ({**BASE, "files": {"test": "rows.xlsx"}}, ROWS, ["rows.xlsx", ".jsonl"]),
        ({**BASE, "files": {"test": "hub:mine"}}, ROWS, ["`hub:OWNER/NAME`"]),
    ],
    ids=["column", "empty", "list", "letter", "text", "uneven", "absent", "form", "hub"],
)
def test_a_row_that_cannot_be_asked(
    about: dict[str, Any], rows: list[dict[str, Any]], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        made(write(tmp_path, about, rows))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_is_asked_for_is_refused_by_name(tmp_path: Path) -> None:
    file = write(tmp_path, BASE)
    for more, message in (
        ({"data_dir": tmp_path}, "names its files itself"),
        ({"split": "dev"}, "has test"),
        ({"protocol": "few_shot_cot"}, "own"),
        ({"subjects": ["other"]}, "other"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(file, **more)
    with pytest.raises(GlmtuneError, match="there is no such file"):
        made(tmp_path / "other.yaml")
    with pytest.raises(ConfigError, match="one that ships"):
        made(file.rename(tmp_path / "mmlu.yaml"))
    with pytest.raises(ConfigError, match=r"`benchmark=my\.yaml`"):
        make_task("quiz")
    assert own_benchmark(write(tmp_path, BASE), None).home == tmp_path


def test_grades_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"q": f"{n} + {n} = ?", "a": f"{n} + {n} = {2 * n}"} for n in range(2, 6)]
    file = write(tmp_path, BASE, rows, score="rouge_l", max_new_tokens=16)
    assert main(["data", "check", f"benchmark={file}"]) == 0
    assert "graded 1.00 for the key itself" in capsys.readouterr().out
    runs = [tmp_path / "plain", tmp_path / "int4"]
    assert main(["eval", f"benchmark={file}", f"output_dir={runs[0]}"]) == 0
    assert "mean grade, %" in capsys.readouterr().out
    assert main(["eval", f"benchmark={file}", f"output_dir={runs[1]}", "quantization=int4"]) == 0
    lines = (runs[0] / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    grades = [json.loads(line)["score"] for line in lines]
    results = json.loads((runs[0] / "results.json").read_text(encoding="utf-8"))
    assert results["accuracy_micro"] == pytest.approx(sum(grades) / 4)
    capsys.readouterr()
    code = main(["compare", f"runs=[{runs[0]},{runs[1]}]", f"output_dir={tmp_path / 'compare'}"])
    assert code in (0, 3, 4)
    assert "paired t test" in capsys.readouterr().out


def test_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiz = DATA / "own_benchmark" / "quiz.yaml"
    assert main(["data", "check", f"benchmark={quiz}"]) == 0
    shown = capsys.readouterr().out
    assert "test 50 questions" in shown
    assert shown.count("[user]") == 3
    assert "letter reads in the key itself" in shown
    assert main(["data", "check", f"benchmark={quiz}", f"report_file={tmp_path / 'r.json'}"]) == 2
    assert "`report_file` is set" in capsys.readouterr().err
    runs = [tmp_path / "plain", tmp_path / "int4"]
    asked = [f"benchmark={quiz}", "benchmark.limit=2"]
    assert main(["eval", *asked, f"output_dir={runs[0]}"]) == 0
    assert main(["eval", *asked, f"output_dir={runs[1]}", "quantization=int4"]) == 0
    results = json.loads((runs[0] / "results.json").read_text(encoding="utf-8"))
    assert results["own_benchmark"]["categories"]["化学"] == "science"
    assert results["num_samples"] == 20
    capsys.readouterr()
    main(["compare", f"runs=[{runs[0]},{runs[1]}]", f"output_dir={tmp_path / 'compare'}"])
    assert "A quiz of fifty questions" in capsys.readouterr().out
