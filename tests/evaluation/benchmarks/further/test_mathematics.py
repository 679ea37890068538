"""GSM-Symbolic and MATH: files of the official layouts, prompts, what their rules make of an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.further import competition_math, gsm_symbolic
from evaluation.benchmarks.tasks import BENCHMARKS, make_task
from evaluation.extraction import equality
from glmtune.errors import DataError, MissingExtraError


def test_gsm_symbolic_is_asked_as_gsm8k_is() -> None:
    task = make_task("gsm_symbolic", data_dir="sample", is_chat=False)
    gsm8k = make_task("gsm8k", data_dir="sample", is_chat=False)
    header = (gsm8k.prompt(gsm8k.samples[0]).text or "").rpartition("Q: ")[0]
    first = task.samples[0]
    assert task.prompt(first).text == f"{header}Q: {first.question}\nA:"
    assert (first.answer, first.row_id, first.cluster, first.subject) == ("14", "0/0", "0", "main")
    assert "<<" not in first.explanation
    assert task.rules == gsm8k.rules
    assert task.headline == "accuracy_macro"
    read = task.answers(first, text="4 boxes of 3 are 12, and 2 make 14. The answer is 14.")
    assert task.is_correct(first, read["decimal"], "decimal")
    assert sum(gsm_symbolic.ROWS.values()) == 12_500


def test_gsm_symbolic_keeps_to_its_rows(describe: Callable[..., Path]) -> None:
    row = {"id": 1, "instance": 2, "original_id": 3, "question": "1 + 1?", "answer": "So 2.\n#### 2"}
    line = json.dumps(row) + "\n"
    folder = describe({"generated_data/GSM_p2.jsonl": line * 2500})
    task = make_task("gsm_symbolic", protocol="zero_shot_cot", data_dir=folder, subjects=["p2"])
    assert (len(task.samples), task.samples[9].row_id, task.samples[9].cluster) == (2500, "3/2", "3")
    describe({"generated_data/GSM_p2.jsonl": json.dumps({**row, "original_id": None}) + "\n" + line * 2499})
    task = make_task("gsm_symbolic", protocol="zero_shot_cot", data_dir=folder, subjects=["p2"])
    assert task.samples[0].cluster == "", "a template that is not named is no template"
    describe({"generated_data/GSM_p2.jsonl": line * 3})
    with pytest.raises(DataError, match=r"3 rows, but this file of gsm_symbolic \(`p2`\) must have 2500"):
        make_task("gsm_symbolic", protocol="zero_shot_cot", data_dir=folder, subjects=["p2"])
    describe({"generated_data/GSM_p2.jsonl": json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n"})
    with pytest.raises(DataError, match="neither there"):
        make_task("gsm_symbolic", data_dir=folder)


@pytest.fixture
def has_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "find_spec", lambda name: object())


@pytest.mark.usefixtures("has_extra")
def test_math_prompts() -> None:
    chat = make_task("math500", data_dir="sample")
    assert chat.protocol == "zero_shot_cot"
    assert chat.prompt(chat.samples[0]).turns[0].content == (
        "What is the value of $3x+2$ when $x=4$?\nPlease reason step by step, and put your final answer within"
        " \\boxed{}."
    )
    base = make_task("math500", data_dir="sample", is_chat=False)
    text = base.prompt(base.samples[0], 1).text
    assert (base.protocol, base.num_fewshot) == ("few_shot_cot", 4)
    assert text == (
        "Problem:\nWhat is $7-3$?\n\nSolution: Taking 3 from 7 leaves $\\boxed{4}$.\nFinal Answer: The final answer is"
        " $4$. I hope it is correct.\n\nProblem:\nWhat is the value of $3x+2$ when $x=4$?\n\nSolution:"
    )
    assert base.limits.max_new_tokens == 2048
    said = "It is 14.\nFinal Answer: The final answer is $14$. I hope it is correct."
    assert base.answers(base.samples[0], text=said) == {
        "equal": "14",
        "boxed": None,
        "text": None,
        "minerva": "14",
    }


def test_math_counts() -> None:
    assert sum(competition_math.MATH_ROWS.values()) == 5000
    assert sum(competition_math.MATH500_ROWS.values()) == 500


@pytest.mark.usefixtures("has_extra")
def test_the_archive_of_the_authors(describe: Callable[..., Path]) -> None:
    def problem(number: int) -> str:
        return json.dumps(
            {
                "problem": f"Number {number}?",
                "level": "Level 1",
                "type": "Geometry",
                "solution": rf"So it is \boxed{{{number}}}.",
            }
        )

    folder = describe({f"MATH/test/geometry/{number}.json": problem(number) for number in range(479)})
    task = make_task("math", data_dir=folder, subjects=["geometry"])
    assert len(task.samples) == 479
    assert [sample.answer for sample in task.samples[9:12]] == ["9", "10", "11"]
    describe({"MATH/test/geometry/7.json": json.dumps({"problem": "?", "solution": "no box"})})
    with pytest.raises(DataError, match=r"no closed `\\boxed"):
        make_task("math", data_dir=folder, subjects=["geometry"])


@pytest.mark.usefixtures("has_extra")
def test_exemplars_of_the_harness_are_parsed_and_not_run(describe: Callable[..., Path]) -> None:
    program = (
        "raise SystemExit('this file was run')\n"
        "def list_fewshot_samples() -> list[dict]:\n"
        "    return [{'problem': 'P?', 'solution': 'S.', 'few_shot': '1'}]\n"
    )
    folder = describe({"minerva_math.py": program})
    assert competition_math.exemplars(folder) == [("P?", "S.")]
    for body in ("return [open('x')]", "return", "pass"):
        describe({"minerva_math.py": f"def list_fewshot_samples():\n    {body}\n"})
        with pytest.raises(DataError, match="no list of `problem` and `solution`"):
            competition_math.exemplars(folder)
    (folder / "minerva_math.py").unlink()
    with pytest.raises(DataError, match="the worked exemplars are missing"):
        competition_math.exemplars(folder)


def test_without_the_extra_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'glmtune\[math\]'"):
        make_task("math500", data_dir="sample")


def test_every_key_of_the_sample_is_found_in_its_own_solution() -> None:
    pytest.importorskip("math_verify")
    task: Any = make_task("math500", data_dir="sample")
    for sample in task.samples:
        read = task.answers(sample, text=sample.explanation)
        assert {rule: task.is_correct(sample, found, rule) for rule, found in read.items()} == {
            "equal": True,
            "boxed": True,
            "text": True,
        }, sample.question
    assert BENCHMARKS["math500"].licence == "MIT"
