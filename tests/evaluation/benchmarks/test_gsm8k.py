"""GSM8K and its Chinese translations: prompts byte for byte, gold answers, files of several kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.benchmarks.gsm8k import gold, without_marks
from evaluation.benchmarks.gsm8k_exemplars import mgsm_exemplars, wei_exemplars
from evaluation.benchmarks.tasks import make_task
from glmtune.errors import DataError
from glmtune.messages import Message

ROW = '{"question": "1+1?", "answer": "1+1=<<1+1=2>>2\\n#### 2"}\n'


def test_all_problems_are_read(benchmarks_data: Path) -> None:
    test = make_task("gsm8k", data_dir=benchmarks_data)
    train = make_task("gsm8k", split="train", data_dir=benchmarks_data)
    assert (len(test.samples), len(train.samples)) == (1319, 7473)
    answers = [int(sample.answer) for sample in test.samples]
    assert sum(answer < 0 for answer in answers) == 2
    assert sum(answer >= 1000 for answer in answers) == 131
    assert not any("<<" in sample.explanation for sample in train.samples)


def test_the_gold_answers_of_the_translations_are_the_english_ones(benchmarks_data: Path) -> None:
    english, chinese, human = (
        make_task(name, data_dir=benchmarks_data) for name in ("gsm8k", "gsm8k_zh", "mgsm_zh")
    )
    assert len(chinese.samples) == 1319
    assert len(human.samples) == 250
    assert [s.answer for s in chinese.samples] == [s.answer for s in english.samples]
    assert [s.answer for s in human.samples] == [s.answer for s in english.samples[:250]]


@pytest.mark.parametrize("is_chat", [True, False])
def test_eight_shot_prompt(benchmarks_data: Path, is_chat: bool) -> None:
    task = make_task("gsm8k", data_dir=benchmarks_data, is_chat=is_chat)
    folder = benchmarks_data / "gsm8k"
    exemplars = json.loads((folder / "cot_prompt_wei2022_8shot.json").read_text(encoding="utf-8"))
    lines = (folder / "test.jsonl").read_text(encoding="utf-8").split("\n")
    shots = [f"Q: {row['question']}\nA: {row['target']}\n\n" for row in exemplars]
    for index in (0, 17, 1318):
        wanted = "".join(shots) + f"Q: {json.loads(lines[index])['question']}\nA:"
        prompt = task.prompt(task.samples[index])
        assert (prompt.turns == (Message("user", wanted),)) if is_chat else (prompt.text == wanted)
    assert task.prompt(task.samples[0], 0).num_fewshot == 0
    assert (task.protocol, task.num_fewshot, task.limits.max_new_tokens) == ("few_shot_cot", 8, 512)
    assert "\nQ:" in task.limits.stop


def test_chinese_prompt(benchmarks_data: Path) -> None:
    exemplars = json.loads(
        (benchmarks_data / "gsm8k_zh/mgsm_exemplars_en_zh.json").read_text(encoding="utf-8")
    )["zh"]
    shots = [f"{exemplars[str(number)]['q']}\n{exemplars[str(number)]['a']}\n\n" for number in range(1, 9)]
    for name in ("mgsm_zh", "gsm8k_zh"):
        task = make_task(name, data_dir=benchmarks_data, is_chat=False)
        sample = task.samples[5]
        assert task.prompt(sample).text == "".join(shots) + f"问题：{sample.question}\n逐步解答："


def test_zero_shot_prompts() -> None:
    chat = make_task("gsm8k", protocol="zero_shot_cot", data_dir="sample")
    base = make_task("gsm8k", protocol="zero_shot_cot", data_dir="sample", is_chat=False)
    question = chat.samples[0].question
    assert chat.prompt(chat.samples[0]).turns == (Message("user", question),)
    assert base.prompt(base.samples[0]).text == f"Q: {question}\nA: Let's think step by step."


def test_rules_side_by_side() -> None:
    task = make_task("gsm8k", data_dir="sample")
    sample = task.samples[0]
    found = task.answers(sample, text=f"The answer is ${sample.answer}.00. There are 3 left.")
    assert found == {
        "decimal": f"{sample.answer}.00", "official": None, "strict": f"{sample.answer}.00", "flexible": "3"
    }  # fmt: skip
    assert task.is_correct(sample, found["decimal"], "decimal")
    assert not task.is_correct(sample, found["flexible"], "flexible")
    assert task.is_correct(sample, sample.answer, "official")
    assert not task.is_correct(sample, f"{sample.answer}.00", "official")


def test_gold_answers(tmp_path: Path) -> None:
    assert gold("text\n#### 1,080", tmp_path, 1) == "1080"
    assert gold("#### -5", tmp_path, 1) == "-5"
    assert without_marks("2*3=<<2*3=6>>6 and 6-1=<<6-1=5>>5") == "2*3=6 and 6-1=5"
    with pytest.raises(DataError, match=r"line 4: the answer has no `#### number` at its end: 'so 5'"):
        gold("so 5", tmp_path, 4)


def test_wrong_number_of_rows(describe: Callable[..., Path]) -> None:
    folder = describe({"test.jsonl": ROW * 3})
    with pytest.raises(DataError, match="3 rows, but this file of gsm8k must have 1319"):
        make_task("gsm8k", protocol="zero_shot_cot", data_dir=folder)


def test_exemplars_missing(describe: Callable[..., Path]) -> None:
    folder = describe({"test.jsonl": ROW}, {"test": {"gsm8k": 1}})
    with pytest.raises(DataError, match=r"exemplars are missing: neither cot_prompt_wei2022_8shot.json nor"):
        make_task("gsm8k", data_dir=folder)


def test_exemplars_from_yaml_of_the_harness(describe: Callable[..., Path]) -> None:
    text = "fewshot_config:\n  samples:\n  - question: How\n      many?\n    target: 2. The answer is 2.\n"
    assert wei_exemplars(describe({"gsm8k-cot.yaml": text})) == [("How many?", "2. The answer is 2.")]
    with pytest.raises(DataError, match="no list of `question` and `target`"):
        wei_exemplars(describe({"gsm8k-cot.yaml": "task: gsm8k\n"}))
    with pytest.raises(DataError, match="no list of `question` and `target`"):
        wei_exemplars(describe({"gsm8k-cot.yaml": "a: [\n"}))


def test_exemplars_from_python_are_read_never_run(describe: Callable[..., Path], tmp_path: Path) -> None:
    evil = tmp_path / "ran"
    text = (
        f"open({str(evil)!r}, 'w')\n"
        "MGSM_EXEMPLARS = {'zh': {'2': {'q': '问题：' '二？', 'a': '逐步解答：答案是 2。'},"
        " '1': {'q': '问题：一？', 'a': '逐步解答：答案是 1。'}}}\n"
    )
    folder = describe({"exemplars.py": text})
    assert mgsm_exemplars(folder) == [("一？", "答案是 1。"), ("二？", "答案是 2。")]
    assert not evil.exists()
    with pytest.raises(DataError, match="no Chinese exemplars"):
        mgsm_exemplars(describe({"exemplars.py": "MGSM_EXEMPLARS = dict(zh=1)\n"}))
    with pytest.raises(DataError, match="no Chinese exemplars"):
        mgsm_exemplars(describe({"exemplars.py": "x = 1\n"}))


def test_english_files_are_not_taken_for_chinese_ones(benchmarks_data: Path) -> None:
    with pytest.raises(DataError, match="English files belong to `benchmark=gsm8k`"):
        make_task("gsm8k_zh", data_dir=benchmarks_data / "gsm8k")


def test_the_repository_layout_is_found(describe: Callable[..., Path]) -> None:
    folder = describe({"grade_school_math/data/test.jsonl": ROW}, {"test": {"gsm8k": 1}})
    task = make_task("gsm8k", protocol="zero_shot_cot", data_dir=folder)
    assert (task.samples[0].answer, task.samples[0].explanation) == ("2", "1+1=2")


def test_malformed_mgsm(describe: Callable[..., Path]) -> None:
    folder = describe({"mgsm_zh.tsv": "几个？\t5,600\n没有数字\n"}, {"test": {"mgsm_zh": 2}})
    with pytest.raises(DataError, match="line 2: a question, a tab and a number were expected"):
        make_task("mgsm_zh", protocol="zero_shot_cot", data_dir=folder)
    describe({"mgsm_zh.tsv": "几个？\t5,600\n几天？\t2"})
    assert make_task("mgsm_zh", protocol="zero_shot_cot", data_dir=folder).samples[0].answer == "5600"
