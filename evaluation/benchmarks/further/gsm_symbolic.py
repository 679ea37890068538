"""GSM-Symbolic: problems of GSM8K made anew from templates (Mirzadeh et al. 2024, arXiv:2410.05229).

One hundred templates, fifty problems of each with other names and numbers: ``main`` as hard as GSM8K, ``p1``
with one clause more, ``p2`` (50 templates) with two. Asked and read as GSM8K is, with the same eight
exemplars, as in the paper. What a model loses from ``gsm8k`` to ``main`` it knew by heart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evaluation.benchmarks.benchmark import (
    Benchmark,
    check_rows,
    expected_rows,
    field_of,
    json_lines,
    sample_set_rows,
)
from evaluation.benchmarks.gsm8k import EN_PROTOCOLS, gold, without_marks
from evaluation.metrics import MACRO, Groups
from evaluation.sample import Sample
from glmtune.errors import DataError

NAME = "gsm_symbolic"
SPLIT = "test"
ROWS = {"main": 5000, "p1": 5000, "p2": 2500}
FILES = {"main": "GSM_symbolic.jsonl", "p1": "GSM_p1.jsonl", "p2": "GSM_p2.jsonl"}
"""Names in the repository; on the hub each is ``SUBJECT/test.jsonl``."""


def load(folder: Path, split: str, subjects: Sequence[str]) -> list[Sample]:
    """Read the problems of some sets.

    Args:
        folder: holds ``main/test.jsonl`` and so on, or ``generated_data/GSM_symbolic.jsonl`` and so on.
        split: ``test``, the only one.
        subjects: ``main``, ``p1``, ``p2``.

    Raises:
        DataError: a file is missing, a row is malformed, or the number of rows is not the official one.
    """
    own = sample_set_rows(folder, split)
    samples: list[Sample] = []
    for subject in subjects:
        path = _file(folder, subject)
        rows = [
            _sample(row, subject, index, path, line)
            for index, (line, row) in enumerate(json_lines(path, name=NAME))
        ]
        expected = expected_rows(own, subject, ROWS[subject])
        check_rows(path, len(rows), expected, name=f"{NAME} (`{subject}`)")
        samples += rows
    return samples


def _sample(row: dict[str, object], subject: str, index: int, path: Path, line: int) -> Sample:
    question, answer = (field_of(row, key, path, line) for key in ("question", "answer"))
    return Sample(
        NAME,
        subject,
        index,
        question,
        answer=gold(answer, path, line),
        row_id=f"{row.get('original_id', '')}/{row.get('instance', index)}",
        # Of which template it is: problems of one template go right or wrong together.
        cluster="" if row.get("original_id") is None else str(row["original_id"]),
        explanation=without_marks(answer[: answer.rfind("####")].strip()),
    )


def _file(folder: Path, subject: str) -> Path:
    names = (f"{subject}/test.jsonl", f"generated_data/{FILES[subject]}", FILES[subject])
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def is_here(folder: Path) -> bool:
    """Say whether a folder holds GSM-Symbolic: files of these names are common, their columns are not."""
    for subject in ROWS:
        path = _file(folder, subject)
        if not path.is_file():
            continue
        try:
            first = next(json_lines(path, name=NAME), None)
        except DataError:
            return False
        return first is not None and {"original_id", "instance"} <= first[1].keys()
    return False


GSM_SYMBOLIC = Benchmark(
    name=NAME,
    title="GSM-Symbolic",
    licence="CC BY-NC-ND 4.0 (non-commercial)",
    splits=(SPLIT,),
    subjects=tuple(ROWS),
    protocols=EN_PROTOCOLS,
    chat_protocol="few_shot_cot",
    base_protocol="few_shot_cot",
    # The paper has a figure for each set and none for all.
    groups=lambda split: Groups(headline=MACRO),
    is_here=is_here,
    load=load,
    folder_names=(NAME, "GSM-Symbolic", "ml-gsm-symbolic"),
)
