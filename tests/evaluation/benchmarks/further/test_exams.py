"""CMMLU, MMLU-Pro, C-Eval Hard: prompts to the byte, files of the official layouts, averages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.further import cmmlu, mmlu_pro
from evaluation.benchmarks.sources import download_of
from evaluation.benchmarks.tasks import BENCHMARKS, make_task
from evaluation.metrics import Outcome, summarize_outcomes
from evaluation.sample import ChoiceScores
from glmtune.errors import ConfigError, DataError

DATA = Path(__file__).parents[4] / "data"


# ---- C-Eval Hard ----


def test_c_eval_hard_is_asked_from_the_files_of_c_eval() -> None:
    task = make_task("ceval_hard", data_dir="sample")
    whole = make_task("ceval", data_dir="sample")
    assert {sample.subject for sample in task.samples} == {"high_school_chemistry"}
    assert task.is_sample_set
    assert not task.is_partial
    assert task.title == "C-Eval Hard"
    asked = {sample.key: whole.prompt(sample) for sample in whole.samples}
    assert all(task.prompt(sample) == asked[sample.key] for sample in task.samples)
    with pytest.raises(ConfigError, match=r"`benchmark.subjects`"):
        make_task("ceval_hard", data_dir="sample", subjects=["high_school_biology"])
    with pytest.raises(ConfigError, match=r"`ceval_hard` is asked from the files of ceval.*data fetch ceval"):
        download_of("ceval_hard")


def test_c_eval_hard_has_the_eight_published_subjects() -> None:
    spec = BENCHMARKS["ceval_hard"]
    assert sorted(spec.subjects) == [
        "advanced_mathematics",
        "college_chemistry",
        "college_physics",
        "discrete_mathematics",
        "high_school_chemistry",
        "high_school_mathematics",
        "high_school_physics",
        "probability_and_statistics",
    ]
    for split in spec.splits:
        assert spec.groups(split).headline == "accuracy_macro"


def test_the_eight_hard_subjects_of_the_official_files(benchmarks_data: Path) -> None:
    task = make_task("ceval_hard", data_dir=benchmarks_data / "ceval")
    assert len(task.samples) == 19 + 18 + 16 + 24 + 19 + 18 + 19 + 19
    assert len({sample.subject for sample in task.samples}) == 8
    assert not task.is_partial
    assert not task.is_sample_set


# ---- CMMLU ----


def test_cmmlu_has_67_subjects_and_its_counts() -> None:
    rows = [entry["test"] for entry in cmmlu.SUBJECTS.values()]
    assert (len(rows), sum(rows)) == (67, 11_582)
    assert len(cmmlu.CHINA) == 15
    categories = [entry["category"] for entry in cmmlu.SUBJECTS.values()]
    counts = {name: categories.count(name) for name in dict.fromkeys(categories)}
    assert sum(counts.values()) == 67
    assert set(counts) == {"STEM", "Humanities", "Social Science", "Other"}
    files = [file.path for file in download_of("cmmlu").files]
    assert sorted(files) == sorted(
        f"{split}/{name}.csv" for split in ("dev", "test") for name in cmmlu.SUBJECTS
    )


def test_cmmlu_asks_as_its_repository_does() -> None:
    task = make_task("cmmlu", data_dir="sample", is_chat=False, num_fewshot=1)
    text = task.prompt(task.samples[0]).text
    assert text == (
        "以下是关于小学常识的单项选择题，请直接给出正确答案的选项。\n\n"
        "题目：一年有几个季节？\nA. 二\nB. 三\nC. 四\nD. 五\n答案是：C\n\n"
        "题目：一星期有几天？\nA. 五\nB. 六\nC. 七\nD. 八\n答案是："
    )
    assert task.choices == ("A", "B", "C", "D")
    assert task.answers(task.samples[0], scores=ChoiceScores((-2.0, -1.0, -0.5, -3.0), 9)) == {
        "official": "C"
    }
    assert make_task("cmmlu", data_dir="sample").num_fewshot == 5
    chat = make_task("cmmlu", data_dir="sample", protocol="zero_shot_cot")
    assert chat.prompt(chat.samples[0]).turns[0].content == (
        "以下是关于小学常识的单项选择题，请分析并选出正确答案。\n\n"
        "题目：一星期有几天？\nA. 五\nB. 六\nC. 七\nD. 八\n逐步分析并给出答案选项。"
    )
    assert chat.answers(chat.samples[0], text="一星期有七天，答案是C。") == {
        "official": "C",
        "strict": "C",
        "loose": "C",
    }


def test_cmmlu_files_are_held_to_their_form(describe: Callable[..., Path]) -> None:
    head, row = ",Question,A,B,C,D,Answer\n", "0,问？,一,二,三,四,A\n"
    folder = describe({"test/arts.csv": head + row * 159})
    with pytest.raises(DataError, match=r"159 rows, but this file of cmmlu must have 160"):
        make_task("cmmlu", protocol="zero_shot_cot", data_dir=folder, subjects=["arts"])
    describe({"test/arts.csv": row * 160})
    with pytest.raises(DataError, match="the header line is"):
        make_task("cmmlu", protocol="zero_shot_cot", data_dir=folder, subjects=["arts"])
    describe({"data/test/arts.csv": head + row * 160, "test/arts.csv": ""})
    task = make_task("cmmlu", protocol="zero_shot_cot", data_dir=folder, subjects=["arts"])
    assert (len(task.samples), task.samples[3].row_id) == (160, "0")


def test_cmmlu_averages_subjects_and_those_of_china_apart() -> None:
    outcomes = [Outcome(name, 0, name in cmmlu.CHINA) for name in cmmlu.SUBJECTS]
    summary = summarize_outcomes(outcomes, BENCHMARKS["cmmlu"].groups("test"))
    assert summary.accuracy == pytest.approx(15 / 67)
    assert summary.further["China specific"].accuracy == pytest.approx(1)
    assert summary.further["China specific"].num_samples == 15


# ---- MMLU-Pro ----


def test_mmlu_pro_has_14_subjects_and_its_counts() -> None:
    assert (len(mmlu_pro.ROWS), sum(mmlu_pro.ROWS.values())) == (14, 12_032)


def test_mmlu_pro_asks_as_its_repository_does() -> None:
    task = make_task("mmlu_pro", data_dir="sample", is_chat=False, num_fewshot=1)
    history = next(sample for sample in task.samples if sample.subject == "history")
    assert task.prompt(history).text == (
        "The following are multiple choice questions (with answers) about history. Think step by step and then finish"
        ' your answer with "the answer is (X)" where X is the correct letter choice.\n\n\n\n'
        "Question:\nWhich came first?\nOptions:\nA. the railway\nB. the telephone\nC. the wheel\nD. the camera\n"
        "E. the car\nF. the radio\n"
        "Answer: Let's think step by step. The wheel is thousands of years old. The answer is (C).\n\n"
        "Question:\nWhat pulled most carts before engines?\nOptions:\nA. horses\nB. clouds\nC. magnets\nD. kites\n"
        "E. whales\nF. steam\nAnswer: Let's think step by step."
    )
    assert task.limits.max_new_tokens == 2048
    assert task.limits.stop == ("Question:",)
    whole = make_task("mmlu_pro", data_dir="sample")
    assert whole.num_fewshot == 5
    read = whole.answers(whole.samples[0], text="7 and 8 make 15. The answer is (E).")
    assert read == {"official": None, "strict": None, "loose": "E"} | {"official": "E", "strict": "E"}
    assert whole.is_correct(whole.samples[0], "E", "official")


def pro_rows(count: int, what: str = "Which", category: str = "history") -> list[dict[str, Any]]:
    return [
        {
            "question_id": 70 + place,
            "question": f"{what} {place}?",
            "options": ["a", "b", "c", "N/A"],
            "answer": "C",
            "answer_index": 2,
            "cot_content": "A: Let's think step by step. So the answer is (C).",
            "category": category,
        }
        for place in range(count)
    ]


def test_mmlu_pro_reads_the_official_parquet_files(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    for split, count in (("test", 381), ("validation", 5)):
        pq.write_table(
            pa.Table.from_pylist(pro_rows(count, split)),
            tmp_path / "data" / f"{split}-00000-of-00001.parquet",
        )
    task = make_task("mmlu_pro", data_dir=tmp_path, subjects=["history"])
    assert len(task.samples) == 381
    assert task.samples[5].choices == ("a", "b", "c")
    assert task.samples[5].row_id == "75"
    assert task.is_partial
    (tmp_path / "data" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="neither there nor in a folder"):
        make_task("mmlu_pro", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": "poetry"}, '`category` is "poetry", but must be one of math'),
        ({"category": ["math"]}, "`category` is .*must be one of math"),
        ({"answer": "D"}, "there are 3 options"),
        ({"answer": "AB"}, '`answer` is "AB"'),
        ({"options": list("abcdefghijk")}, "there are 11 options"),
        ({"options": "a, b"}, "`options` a list of texts"),
        ({"question": None}, "must be texts"),
    ],
    ids=["category", "category_list", "beyond", "two letters", "eleven", "no list", "no text"],
)
def test_mmlu_pro_rows_that_cannot_be_asked(
    change: dict[str, Any], message: str, describe: Callable[..., Path]
) -> None:
    rows = pro_rows(2)
    rows[1] |= change
    text = "".join(json.dumps(row) + "\n" for row in rows)
    folder = describe({"test.jsonl": text}, {"test": {"history": 2}})
    with pytest.raises(DataError, match="line 2: .*" + message.replace("(", r"\(")):
        make_task("mmlu_pro", protocol="zero_shot_cot", data_dir=folder)


@pytest.mark.parametrize("name", ["cmmlu", "mmlu_pro"])
def test_exemplars_are_not_asked(name: str) -> None:
    asked = {sample.question for sample in make_task(name, data_dir="sample").samples}
    split = BENCHMARKS[name].splits[1]
    shown = {
        sample.question
        for sample in make_task(name, protocol="zero_shot_cot", data_dir="sample", split=split).samples
    }
    assert asked
    assert not asked & shown
