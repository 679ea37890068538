"""The shipped sample sets are what the package makes, and none of their rows is a real benchmark's."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.benchmarks.tasks import make_task
from glmtune.tiny.corpus.benchmarks import SETS

DATA = Path(__file__).resolve().parents[3] / "data"


@pytest.mark.parametrize("name", SETS)
def test_shipped_files_are_the_ones_made(name: str) -> None:
    files = SETS[name]()
    for path, text in files.items():
        shipped = (DATA / name / path).read_text(encoding="utf-8")
        assert shipped == text, f"{name}/{path} is stale: run `python -m glmtune.tiny.corpus.benchmarks data`"
    on_disk = {str(path.relative_to(DATA / name)) for path in (DATA / name).rglob("*") if path.is_file()}
    assert on_disk == {*files, "README.md"}


@pytest.mark.parametrize("name", ["ceval", "mmlu", "gsm8k", "gsm8k_zh", "bbh"])
def test_no_question_of_the_real_benchmark(name: str, benchmarks_data: Path) -> None:
    real = {sample.question for sample in make_task(name, data_dir=benchmarks_data).samples}
    ours = [sample.question for sample in make_task(name, data_dir="sample").samples]
    assert not real & set(ours)
    assert len(set(ours)) == len(ours)


def test_exemplars_are_not_asked() -> None:
    for name in ("ceval", "mmlu"):
        dev = make_task(name, data_dir="sample", split="dev")
        asked = make_task(name, data_dir="sample")
        assert not {sample.question for sample in dev.samples} & {sample.question for sample in asked.samples}
    for name in ("gsm8k", "bbh", "gsm8k_zh"):
        task = make_task(name, data_dir="sample")
        for sample in task.samples:
            prompt = task.prompt(sample).turns[0].content
            assert prompt.count(f"{sample.question}\n") == 1
