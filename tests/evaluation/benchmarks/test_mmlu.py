"""MMLU: prompts byte for byte, sizes, and the files' defects."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.benchmarks.tasks import make_task
from glmtune.errors import ConfigError, DataError
from glmtune.messages import Message

HEADER = "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"


def rows_of(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def block(row: list[str]) -> str:
    return f"{row[0]}\nA. {row[1]}\nB. {row[2]}\nC. {row[3]}\nD. {row[4]}"


@pytest.mark.parametrize(("split", "size"), [("dev", 285), ("val", 1531), ("test", 14042)])
def test_all_questions_are_read(benchmarks_data: Path, split: str, size: int) -> None:
    task = make_task("mmlu", split=split, data_dir=benchmarks_data / "mmlu")
    assert len(task.samples) == size
    assert task.labelled
    cells = [cell for sample in task.samples for cell in sample.choices]
    assert cells.count("None") == {"dev": 0, "val": 2, "test": 10}[split]


def test_cells_are_untouched(benchmarks_data: Path) -> None:
    """1,531 cells begin or end with a blank and 1,293 hold newlines: none is stripped."""
    cells = [
        cell
        for split in ("dev", "val", "test")
        for sample in make_task("mmlu", split=split, data_dir=benchmarks_data).samples
        for cell in (sample.question, *sample.choices)
    ]
    assert sum(cell != cell.strip() for cell in cells) == 1531
    assert sum("\n" in cell for cell in cells) == 1293


def test_few_shot_direct_prompt(benchmarks_data: Path) -> None:
    task = make_task("mmlu", data_dir=benchmarks_data, is_chat=False, subjects=["abstract_algebra"])
    assert (task.protocol, task.kind, task.num_fewshot) == ("few_shot_direct", "choices", 5)
    assert task.choices == (" A", " B", " C", " D")
    dev = rows_of(benchmarks_data / "mmlu/dev/abstract_algebra_dev.csv")
    test = rows_of(benchmarks_data / "mmlu/test/abstract_algebra_test.csv")
    shots = [f"{block(row)}\nAnswer: {row[5]}\n\n" for row in dev]
    assert len(test) == 100
    for sample, row in zip(task.samples, test, strict=True):
        assert task.prompt(sample).text == HEADER + "".join(shots) + f"{block(row)}\nAnswer:"
        assert task.prompt(sample, 4).text == HEADER + "".join(shots[:4]) + f"{block(row)}\nAnswer:"
        assert sample.answer == row[5]


def test_zero_shot_cot_prompts(benchmarks_data: Path) -> None:
    task = make_task("mmlu", data_dir=benchmarks_data, subjects=["abstract_algebra"])
    row = rows_of(benchmarks_data / "mmlu/test/abstract_algebra_test.csv")[0]
    sample = task.samples[0]
    assert task.protocol == "zero_shot_cot"
    assert task.prompt(sample).turns == (Message("user", block(row)),)
    cue = "\nTherefore, among A through D, the answer is"
    assert task.extraction_prompt(sample, "It is 4.").turns == (
        Message("user", f"{block(row)}It is 4.{cue}"),
    )
    base = make_task(
        "mmlu",
        protocol="zero_shot_cot",
        data_dir=benchmarks_data,
        is_chat=False,
        subjects=["abstract_algebra"],
    )
    text = f"{HEADER}{block(row)}\nAnswer: Let's think step by step."
    assert base.prompt(sample).text == text
    assert base.extraction_prompt(sample, " It is 4.").text == f"{text} It is 4.{cue}"


def test_default_protocol_depends_on_the_kind_of_model() -> None:
    assert make_task("mmlu", data_dir="sample", is_chat=True).protocol == "zero_shot_cot"
    assert make_task("mmlu", data_dir="sample", is_chat=False).protocol == "few_shot_direct"


def test_no_explanations_no_chains_of_thought() -> None:
    with pytest.raises(ConfigError, match="`protocol` of mmlu is `few_shot_cot`, which does not exist"):
        make_task("mmlu", protocol="few_shot_cot", data_dir="sample")


def test_a_table_that_lost_its_first_row_to_a_header_is_refused(describe: Callable[..., Path]) -> None:
    """One mirror has 13,985 test rows for that reason."""
    row = "1+1=?,1,2,3,4,B\n"
    folder = describe({"test/abstract_algebra_test.csv": row * 99})
    with pytest.raises(DataError, match=r"99 rows, but this file of mmlu must have 100\. One row too few"):
        make_task("mmlu", data_dir=folder, subjects=["abstract_algebra"])
    describe({"test/abstract_algebra_test.csv": row * 100})
    assert len(make_task("mmlu", data_dir=folder, subjects=["abstract_algebra"]).samples) == 100


def test_the_tar_of_the_authors_unpacks_to_data(describe: Callable[..., Path]) -> None:
    folder = describe({"data/test/abstract_algebra_test.csv": "1+1=?,1,2,3,None,B\n" * 100})
    sample = make_task("mmlu", data_dir=folder, subjects=["abstract_algebra"]).samples[99]
    assert (sample.index, sample.choices[3], sample.row_id) == (99, "None", "99")
