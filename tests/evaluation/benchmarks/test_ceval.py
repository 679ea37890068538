"""C-Eval: prompts byte for byte, both layouts, and the files' defects."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.benchmarks.benchmark import subject_table
from evaluation.benchmarks.tasks import make_task
from evaluation.sample import ChoiceScores
from glmtune.errors import DataError
from glmtune.messages import Message

LOGIC = "以下是中国关于逻辑学考试的单项选择题，请选出其中的正确答案。\n\n"
DEV = "id,question,A,B,C,D,answer,explanation\r\n"
VAL = "id,question,A,B,C,D,answer\r\n"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def block(row: dict[str, str]) -> str:
    return f"{row['question']}\nA. {row['A']}\nB. {row['B']}\nC. {row['C']}\nD. {row['D']}"


def test_subjects_are_those_of_the_official_mapping(benchmarks_data: Path) -> None:
    mapping = json.loads((benchmarks_data / "ceval/subject_mapping.json").read_text(encoding="utf-8"))
    ours = {name: (facts["chinese"], facts["category"]) for name, facts in subject_table("ceval").items()}
    assert ours == {name: (chinese, category) for name, (_, chinese, category) in mapping.items()}
    assert list(ours) == list(mapping)


@pytest.mark.parametrize(("split", "size"), [("dev", 260), ("val", 1346), ("test", 12342)])
def test_all_questions_are_read(benchmarks_data: Path, split: str, size: int) -> None:
    task = make_task("ceval", split=split, data_dir=benchmarks_data / "ceval")
    assert len(task.samples) == size
    assert len({sample.key for sample in task.samples}) == size
    assert task.labelled == (split != "test")
    assert not task.is_sample_set
    assert all(len(sample.choices) == 4 for sample in task.samples)


def test_zero_shot_prompts_are_the_ones_of_chatglm2(benchmarks_data: Path) -> None:
    """Its script asks the bare question and puts the completion into the second user turn."""
    task = make_task("ceval", data_dir=benchmarks_data)
    assert (task.protocol, task.kind, task.choices) == (
        "zero_shot_cot", "generate_then_choices", ("A", "B", "C", "D"))  # fmt: skip
    official = {
        (path.stem, index): json.loads(line)["inputs_pretokenized"]
        for path in (benchmarks_data / "ceval_chatglm2/CEval/val").glob("*/*.jsonl")
        for index, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
    }
    assert len(official) == len(task.samples) == 1346
    for sample in task.samples:
        assert task.prompt(sample).turns == (Message("user", official[sample.key]),)
        second = task.extraction_prompt(sample, "因为甲，所以乙。")
        wanted = official[sample.key] + "因为甲，所以乙。\n综上所述，ABCD中正确的选项是："
        assert second.turns == (Message("user", wanted),)
    assert (task.limits.max_new_tokens, task.limits.stop) == (512, ())


@pytest.mark.parametrize("split", ["val", "test"])
def test_both_layouts_hold_the_same_questions(benchmarks_data: Path, split: str) -> None:
    """Eleven questions of the test split are older in ChatGLM2's archive."""
    table = make_task("ceval", split=split, data_dir=benchmarks_data / "ceval")
    lines = make_task("ceval", split=split, data_dir=benchmarks_data / "ceval_chatglm2")
    pairs = list(zip(table.samples, lines.samples, strict=True))
    assert all(left.key == right.key and left.answer == right.answer for left, right in pairs)
    assert sum(left != right for left, right in pairs) == (0 if split == "val" else 11)
    assert (table.data_hash == lines.data_hash) == (split == "val")
    assert lines.labelled == (split == "val")


def test_few_shot_direct_prompt(benchmarks_data: Path) -> None:
    task = make_task(
        "ceval", protocol="few_shot_direct", data_dir=benchmarks_data, is_chat=False, subjects=["logic"]
    )
    dev = rows_of(benchmarks_data / "ceval/dev/logic_dev.csv")
    val = rows_of(benchmarks_data / "ceval/val/logic_val.csv")
    shots = [f"{block(row)}\n答案：{row['answer']}\n\n" for row in dev]
    assert len(val) == 22
    for sample, row in zip(task.samples, val, strict=True):
        question = f"{block(row)}\n答案："
        assert task.prompt(sample).text == LOGIC + "".join(shots) + question
        assert task.prompt(sample, 2).text == LOGIC + "".join(shots[:2]) + question
        assert task.prompt(sample, 0).text == LOGIC + question
        assert task.prompt(sample, 2).num_fewshot == 2
        assert sample.answer == row["answer"]
    assert (task.kind, task.num_fewshot, task.choices) == ("choices", 5, ("A", "B", "C", "D"))


def test_few_shot_direct_of_a_chat_model_takes_turns(benchmarks_data: Path) -> None:
    task = make_task("ceval", protocol="few_shot_direct", data_dir=benchmarks_data, subjects=["logic"])
    dev = rows_of(benchmarks_data / "ceval/dev/logic_dev.csv")
    val = rows_of(benchmarks_data / "ceval/val/logic_val.csv")
    turns = task.prompt(task.samples[0]).turns
    assert [turn.role for turn in turns] == ["user", "assistant"] * 5 + ["user"]
    assert turns[0].content == f"{LOGIC}{block(dev[0])}\n答案："
    assert turns[3].content == dev[1]["answer"]
    assert turns[-1].content == f"{block(val[0])}\n答案："
    assert task.prompt(task.samples[0], 0).turns == (Message("user", f"{LOGIC}{block(val[0])}\n答案："),)


def test_few_shot_cot_prompt(benchmarks_data: Path) -> None:
    task = make_task(
        "ceval", protocol="few_shot_cot", data_dir=benchmarks_data, is_chat=False, subjects=["logic"]
    )
    dev = rows_of(benchmarks_data / "ceval/dev/logic_dev.csv")
    val = rows_of(benchmarks_data / "ceval/val/logic_val.csv")
    steps = "答案：让我们一步一步思考，\n"
    shots = [f"{block(row)}\n{steps}{row['explanation']}\n所以答案是{row['answer']}。\n\n" for row in dev]
    assert task.prompt(task.samples[3]).text == LOGIC + "".join(shots) + f"{block(val[3])}\n{steps}"
    assert list(task.rules) == ["official", "strict", "loose"]
    chat = make_task("ceval", protocol="few_shot_cot", data_dir=benchmarks_data, subjects=["logic"])
    turns = chat.prompt(chat.samples[3]).turns
    answer = f"让我们一步一步思考，\n{dev[0]['explanation']}\n所以答案是{dev[0]['answer']}。"
    assert turns[1] == Message("assistant", answer)
    assert turns[-1].content == f"{block(val[3])}\n答案："


def test_rules_are_applied_to_what_is_there() -> None:
    task = make_task("ceval", data_dir="sample")
    sample = task.samples[0]
    scores = ChoiceScores(tuple(0.0 if letter == sample.answer else -1.0 for letter in "ABCD"), 9)
    both = task.answers(sample, text="不知道", scores=scores)
    assert both == {"official": sample.answer, "script": None, "strict": None, "loose": None}
    assert list(task.answers(sample, text=f"所以答案是{sample.answer}。")) == ["script", "strict", "loose"]
    assert task.is_correct(sample, both["official"], "official")
    assert not task.is_correct(sample, None, "loose")


def test_cells_are_text_and_keep_their_newlines(describe: Callable[..., Path]) -> None:
    text = VAL + '0,"第一行\n第二行",None,NA,"1,000", 空 ,A\r\n1,题,甲,乙,丙,丁,D\r\n'
    folder = describe({"val/logic_val.csv": "\ufeff" + text}, {"val": {"logic": 2}})
    first, second = make_task("ceval", data_dir=folder).samples
    assert first.question == "第一行\n第二行"
    assert first.choices == ("None", "NA", "1,000", " 空 ")
    assert (second.answer, second.row_id) == ("D", "1")


def test_test_split_with_and_without_answers(describe: Callable[..., Path]) -> None:
    """The authors released the answers of the test split in July 2025."""
    folder = describe(
        {"test/logic_test.csv": "id,question,A,B,C,D\r\n7,题,甲,乙,丙,丁\r\n"}, {"test": {"logic": 1}}
    )
    task = make_task("ceval", split="test", data_dir=folder)
    assert (task.labelled, task.samples[0].row_id) == (False, "7")
    describe({"test/logic_test.csv": VAL + "7,题,甲,乙,丙,丁,C\r\n"})
    assert make_task("ceval", split="test", data_dir=folder).labelled


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            VAL + "0,题,甲,乙,丙,丁,E\r\n",
            r"logic_val.csv, line 2: the answer is 'E', but it must be A, B, C or D",
        ),
        (VAL + "0,题,甲,乙,丙,丁\r\n", r"line 2: 6 cells, but every row must have 7"),
        ("0,题,甲,乙,丙,丁,A\r\n", r"line 1: the header line is .*absent: id, question, B, C, D"),
        (VAL + "0,题,甲,乙,丙,丁,A\r\n" * 2, r"2 rows, but this file of ceval must have 1\."),
        (VAL, r"0 rows, but this file of ceval must have 1\. One row too few .*glmtune data fetch ceval"),
    ],
)
def test_malformed_csv(describe: Callable[..., Path], text: str, words: str) -> None:
    folder = describe({"val/logic_val.csv": text}, {"val": {"logic": 1}})
    with pytest.raises(DataError, match=words):
        make_task("ceval", data_dir=folder)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": 0', r"law.jsonl, line 1: no JSON"),
        ('["a"]', r"line 1: a JSON object was expected"),
        ('{"id": 0}', r"the field `inputs_pretokenized` is absent\. Fields here: id"),
        ('{"inputs_pretokenized": "题\\nA. 甲"}', r"has no options A\. to D\. in lines"),
        (
            '{"inputs_pretokenized": "题\\nA. 甲\\nB. 乙\\nC. 丙\\nD. 丁", "label": 4, "targets_pretokenized": ["E"]}',
            r"`label` is 4 .*from 0 to 3",
        ),
    ],
)
def test_malformed_json_lines(describe: Callable[..., Path], line: str, words: str) -> None:
    folder = describe({"CEval/val/Humanities/law.jsonl": line + "\n"})
    with pytest.raises(DataError, match=words):
        make_task("ceval", data_dir=folder, subjects=["law"])


def test_official_sizes_are_asserted(describe: Callable[..., Path]) -> None:
    folder = describe({"val/logic_val.csv": VAL + "0,题,甲,乙,丙,丁,A\r\n"})
    with pytest.raises(DataError, match=r"logic_val.csv: 1 rows, but this file of ceval must have 22"):
        make_task("ceval", data_dir=folder, subjects=["logic"])
    with pytest.raises(DataError, match=r"law_val.csv: this file of ceval is missing\. Download"):
        make_task("ceval", data_dir=folder, subjects=["law"])


def test_no_exemplars_in_chatglm2s_layout(benchmarks_data: Path) -> None:
    with pytest.raises(DataError, match="no dev split, so there are no exemplars"):
        make_task("ceval", protocol="few_shot_direct", data_dir=benchmarks_data / "ceval_chatglm2")
