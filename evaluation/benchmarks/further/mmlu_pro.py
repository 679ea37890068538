"""MMLU-Pro: 12,032 questions of 14 subjects with up to ten options (Wang et al. 2024, arXiv:2406.01574).

Prompt and the official rule as in TIGER-AI-Lab/MMLU-Pro, ``evaluate_from_local.py``: five worked examples of
the subject from the validation split, whose reasoning comes with the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.backend import Limits
from evaluation.benchmarks.benchmark import (
    WAY_OUT,
    Ask,
    Benchmark,
    check_rows,
    expected_rows,
    json_lines,
    sample_set_rows,
)
from evaluation.extraction import many_letters, mmlu_pro
from evaluation.fewshot import Exemplar, FewShot, as_text, text_prompt
from evaluation.metrics import MICRO, Groups
from evaluation.sample import ALPHABET, Prompt, Sample
from evaluation.task import GENERATE, PreparedProtocol, Rule
from glmtune.errors import DataError
from glmtune.storage.records import shown

NAME = "mmlu_pro"
ROWS = {
    "math": 1351,
    "physics": 1299,
    "chemistry": 1132,
    "law": 1101,
    "engineering": 969,
    "other": 924,
    "economics": 844,
    "health": 818,
    "psychology": 798,
    "business": 789,
    "biology": 717,
    "philosophy": 499,
    "computer science": 410,
    "history": 381,
}
"""Questions of each subject in the test split; validation has five each."""
DEV_ROWS = 5
SPLITS = ("test", "validation")
MAX_OPTIONS = 10
ABSENT = "N/A"
"""An option that is none: older releases fill rows with it, and the official code leaves it out."""
COT_TOKENS = 2048
STOPS = ("Question:",)
CUE = "Answer: Let's think step by step."
_CUE_OF_DATA = "A: Let's think step by step."
RULES = {
    "official": Rule("the repository's three regular expressions, nothing made up", mmlu_pro.official),
    "strict": Rule("`answer is (X)`, the first", mmlu_pro.strict),
    "loose": Rule("what a careful reader finds", many_letters.loose),
}


def header(subject: str) -> str:
    """Return the lines before the examples; the official file ends with three breaks, its code adds one."""
    return (
        f"The following are multiple choice questions (with answers) about {subject}. Think step by step and"
        ' then finish your answer with "the answer is (X)" where X is the correct letter choice.\n\n\n\n'
    )


def load(folder: Path, split: str, subjects: Sequence[str]) -> list[Sample]:
    """Read a split: the official Parquet file, or JSON lines with the same columns.

    Args:
        folder: holds ``data/test-00000-of-00001.parquet`` (or the files of ``data``, or ``test.jsonl``).
        split: ``test`` or ``validation``.
        subjects: whose questions to read, in the order of the file.

    Raises:
        DataError: the file is missing, a row is malformed, or the number of rows is not the official one.
    """
    own = sample_set_rows(folder, split)
    path = _file(folder, split)
    found: dict[str, list[Sample]] = {subject: [] for subject in ROWS}
    for line, row in _rows(path):
        subject = row.get("category")
        if not isinstance(subject, str) or subject not in found:
            raise DataError(
                f"`category` is {shown(subject)}, but must be one of {', '.join(ROWS)}.", path=path, line=line
            )
        found[subject].append(_sample(row, subject, len(found[subject]), path, line))
    for subject in subjects:
        expected = expected_rows(own, subject, DEV_ROWS if split == "validation" else ROWS[subject])
        check_rows(path, len(found[subject]), expected, name=f"{NAME} (`{subject}`)", way_out=_way_out())
    return [sample for subject in subjects for sample in found[subject]]


def _way_out() -> str:
    return WAY_OUT.format(name=NAME)


def _files(folder: Path, split: str) -> list[Path]:
    parquet = [path for root in (folder / "data", folder) for path in sorted(root.glob(f"{split}-*.parquet"))]
    return [*parquet, folder / f"{split}.parquet", folder / f"{split}.jsonl"]


def _file(folder: Path, split: str) -> Path:
    places = _files(folder, split)
    return next((path for path in places if path.is_file()), places[-1])


def is_here(folder: Path) -> bool:
    """Say whether a folder holds MMLU-Pro: other data sets have Parquet files of these names, too."""
    path = _file(folder, "test")
    if not path.is_file():
        return False
    try:
        first = next(iter(_rows(path)), None)
    except DataError:
        return False
    return first is not None and {"options", "category", "cot_content"} <= first[1].keys()


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield place (from 1) and columns of every row."""
    if path.suffix != ".parquet":
        yield from json_lines(path, name=NAME)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        place = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=512):
            for row in batch.to_pylist():
                place += 1
                yield place, row
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"no Parquet file that can be read ({str(error)[:120]}). {_way_out()}", path=path
        ) from None


def _sample(row: Mapping[str, Any], subject: str, index: int, path: Path, line: int) -> Sample:
    options, answer, question = row.get("options"), row.get("answer"), row.get("question")
    worked = row.get("cot_content") or ""
    if (
        not isinstance(question, str)
        or not isinstance(worked, str)
        or not isinstance(options, list)
        or not all(isinstance(each, str) for each in options)
    ):
        raise DataError(
            "`question` and `cot_content` must be texts and `options` a list of texts; the row has"
            f" {shown(json.dumps(dict(row), default=str))}.",
            path=path,
            line=line,
        )
    choices = tuple(option for option in options if option != ABSENT)
    letters = ALPHABET[: len(choices)]
    if not 2 <= len(choices) <= MAX_OPTIONS or not isinstance(answer, str) or answer not in tuple(letters):
        raise DataError(
            f"`answer` is {shown(answer)} and there are {len(choices)} options, but a question has 2 to"
            f" {MAX_OPTIONS}, of which one letter is right. {_way_out()}",
            path=path,
            line=line,
        )
    row_id = str(row.get("question_id", index))
    return Sample(NAME, subject, index, question, choices, answer, row_id=row_id, explanation=worked)


def asked(sample: Sample) -> str:
    """Return a question with its options and the cue for the answer."""
    options = "".join(f"{letter}. {text}\n" for letter, text in zip(ALPHABET, sample.choices, strict=False))
    return f"Question:\n{sample.question}\nOptions:\n{options}{CUE}"


def few_shot_cot(ask: Ask) -> PreparedProtocol:
    """Five worked examples of the subject; the letter is read from the completion, as published."""
    shots: dict[str, list[Exemplar]] = {}
    for row in load(ask.folder, "validation", ask.subjects):
        # The data begin a solution with a cue of another wording; the official code puts its own there, which
        # here stands at the end of the question already.
        worked = row.explanation.replace(_CUE_OF_DATA, CUE)
        shots.setdefault(row.subject, []).append(Exemplar(asked(row), worked.removeprefix(CUE)))

    def write(sample: Sample, num_fewshot: int) -> Prompt:
        kept = shots[sample.subject][:num_fewshot]
        text = as_text(header(sample.subject), kept, asked(sample))
        return text_prompt(text, num_fewshot=len(kept), is_chat=ask.is_chat)

    return PreparedProtocol(
        kind=GENERATE,
        rules=RULES,
        write=write,
        limits=Limits(COT_TOKENS, stop=STOPS),
        num_fewshot=min(map(len, shots.values())),
        few_shot=FewShot(shots, asked),
    )


def zero_shot_cot(ask: Ask) -> PreparedProtocol:
    """The same without examples, which chat models are asked as well."""

    def write(sample: Sample, num_fewshot: int) -> Prompt:
        del num_fewshot
        return text_prompt(header(sample.subject) + asked(sample), num_fewshot=0, is_chat=ask.is_chat)

    return PreparedProtocol(kind=GENERATE, rules=RULES, write=write, limits=Limits(COT_TOKENS, stop=STOPS))


MMLU_PRO = Benchmark(
    name=NAME,
    title="MMLU-Pro",
    licence="MIT",
    splits=SPLITS,
    subjects=tuple(ROWS),
    protocols={"few_shot_cot": few_shot_cot, "zero_shot_cot": zero_shot_cot},
    chat_protocol="few_shot_cot",
    base_protocol="few_shot_cot",
    groups=lambda split: Groups(headline=MICRO),
    is_here=is_here,
    load=load,
    folder_names=("mmlu_pro", "MMLU-Pro"),
)
