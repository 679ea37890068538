"""A question is not asked below its own answer, whichever file, split or benchmark it comes from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.gsm8k_exemplars import wei_exemplars
from evaluation.benchmarks.tasks import make_task, task_of
from evaluation.running.fingerprint import fingerprint
from evaluation.settings import BenchmarkSettings
from glmtune.data.reading.shipped import shipped_folder
from glmtune.errors import ConfigError
from tests.evaluation.doubles import IDENTITY

ROWS = "Odd {0}?,1,2,3,4,A\n"
WORDS = "questions stand among their own"


@pytest.mark.parametrize(
    ("benchmark", "protocol"),
    [("ceval", "few_shot_direct"), ("ceval", "few_shot_cot"), ("mmlu", "few_shot_direct")],
)
def test_a_split_that_holds_the_exemplars(benchmark: str, protocol: str) -> None:
    settings: dict[str, Any] = {"protocol": protocol, "split": "dev", "data_dir": "sample", "is_chat": False}
    with pytest.raises(ConfigError, match=r"20 of its 20 .*`protocol=zero_shot_cot`.*`benchmark.split=val`"):
        make_task(benchmark, **settings)
    assert make_task(benchmark, **settings, num_fewshot=0).num_fewshot == 0
    assert len(make_task(benchmark, **{**settings, "protocol": "zero_shot_cot"}).samples) == 20


def test_official_dev_is_refused_and_the_published_repeat_is_not(benchmarks_data: Path) -> None:
    for name, size in (("ceval", 260), ("mmlu", 285)):
        with pytest.raises(ConfigError, match=f"{size} of its {size} {WORDS}"):
            make_task(name, protocol="few_shot_direct", split="dev", data_dir=benchmarks_data)
        assert make_task(name, protocol="few_shot_direct", split="val", data_dir=benchmarks_data)


def test_one_question_in_both_files_is_named(describe: Callable[..., Path]) -> None:
    files = {
        "dev/jurisprudence_dev.csv": "".join(map(ROWS.format, range(3))),
        "test/jurisprudence_test.csv": ROWS.format(7) + "odd  2?,1, 2,3,4,A\n" + ROWS.format(8),
    }
    folder = describe(files, {"dev": {"jurisprudence": 3}, "test": {"jurisprudence": 3}})
    ask: dict[str, Any] = {"protocol": "few_shot_direct", "data_dir": folder, "is_chat": False}
    with pytest.raises(ConfigError, match=rf"1 of its 3 {WORDS} 3 exemplars.*first: `jurisprudence` 1"):
        make_task("mmlu", **ask)
    # The exemplar that is the question has gone, or the question is not asked.
    assert make_task("mmlu", **ask, num_fewshot=2).num_fewshot == 2
    assert len(make_task("mmlu", **ask, limit=1).samples) == 1


def test_exemplars_in_a_file_of_word_problems(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(shipped_folder() / "gsm8k_sample", folder)
    question, _ = wei_exemplars(folder)[3]
    row = json.dumps({"question": f"{question} ", "answer": "So.\n#### 1"})
    (folder / "test.jsonl").write_text(row, encoding="utf-8")
    (folder / "sample_set.json").write_text('{"rows": {"test": {"gsm8k": 1}}}', encoding="utf-8")
    with pytest.raises(ConfigError, match=f"1 of its 1 {WORDS}"):
        make_task("gsm8k", data_dir=folder)
    assert make_task("gsm8k", data_dir=folder, num_fewshot=3).num_fewshot == 3


@pytest.mark.parametrize("protocol", ["few_shot_cot", "few_shot_direct"])
def test_exemplars_of_a_task_in_its_items(describe: Callable[..., Path], protocol: str) -> None:
    items = json.dumps({"examples": [{"input": "1?", "target": "Yes"}]})
    prompt = "canary\n-----\nAbout.\n\nQ: 1?\nA: Let's think step by step.\nOne. So the answer is Yes."
    folder = describe(
        {"bbh/navigate.json": items, "cot-prompts/navigate.txt": prompt}, {"test": {"navigate": 1}}
    )
    with pytest.raises(ConfigError, match=f"1 of its 1 {WORDS} 1 exemplars"):
        make_task("bbh", protocol=protocol, data_dir=folder)


def test_answers_may_be_longer_and_that_makes_another_run() -> None:
    usual = make_task("gsm8k", data_dir="sample")
    settings = BenchmarkSettings(name="gsm8k", data_dir="sample", max_new_tokens=4096)
    long = task_of(settings, "gsm8k", None, is_chat=True)
    assert (usual.limits.max_new_tokens, long.limits.max_new_tokens) == (512, 4096)
    assert long.limits.stop == usual.limits.stop
    assert fingerprint(long, IDENTITY, 8192) != fingerprint(usual, IDENTITY, 8192)
    with pytest.raises(ConfigError, match="`protocol=few_shot_direct` compares probabilities"):
        make_task("ceval", protocol="few_shot_direct", data_dir="sample", max_new_tokens=8)
    with pytest.raises(ConfigError, match=r"`benchmark\.max_new_tokens` is 0"):
        BenchmarkSettings(max_new_tokens=0)
