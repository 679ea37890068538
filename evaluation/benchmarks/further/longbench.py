"""LongBench, question answering: eight data sets about long texts (Bai et al. 2023, arXiv:2308.14508).

Prompts and lengths of answers are read from the files of THUDM/LongBench that publish them; answers are
graded as there, by F1 over words or ROUGE-L (``dureader``), against the nearest of several references. A text
that does not fit the model's context loses its middle, as there, where both ends may hold what is asked.

The other thirteen data sets are not offered: summaries by ROUGE alone say little of a chat model, and
few-shot, retrieval and code tasks need prompts without a template and scores of their own.
"""

from __future__ import annotations

import json
import re
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
    field_of,
    json_lines,
    read_text,
    sample_set_rows,
)
from evaluation.extraction import overlap
from evaluation.fewshot import text_prompt
from evaluation.metrics import MACRO, Groups
from evaluation.sample import Prompt, Sample
from evaluation.task import GENERATE, PreparedProtocol, Rule
from glmtune.errors import DataError
from glmtune.storage.records import shown

NAME = "longbench"
SPLIT = "test"
SINGLE, MULTI = "Single-document QA", "Multi-document QA"
SUBJECTS: Mapping[str, tuple[str, int]] = {
    "narrativeqa": (SINGLE, 200),
    "qasper": (SINGLE, 200),
    "multifieldqa_en": (SINGLE, 150),
    "multifieldqa_zh": (SINGLE, 200),
    "hotpotqa": (MULTI, 200),
    "2wikimqa": (MULTI, 200),
    "musique": (MULTI, 200),
    "dureader": (MULTI, 200),
}
"""Data set to category and questions."""
GRADES = {"multifieldqa_zh": overlap.f1_zh, "dureader": overlap.rouge_l}
"""How answers of a data set are graded, where not by `overlap.f1_en`."""
PROMPTS, LENGTHS = "dataset2prompt.json", "dataset2maxlen.json"
MAX_ANSWER_TOKENS = 4096
BETWEEN = "\x1f"
"""Between the references of which the nearest counts; no text has it."""
_FIELD = re.compile(r"\{(context|input)\}")


def load(folder: Path, split: str, subjects: Sequence[str]) -> list[Sample]:
    """Read the questions of some data sets; their texts are read with the prompts.

    Args:
        folder: holds ``data/SUBJECT.jsonl``.
        split: ``test``, the only one.
        subjects: such as ``hotpotqa``.

    Raises:
        DataError: a file is missing, a row is malformed, or the number of rows is not the official one.
    """
    own = sample_set_rows(folder, split)
    samples: list[Sample] = []
    for subject in subjects:
        path = _file(folder, subject)
        rows = [_sample(row, subject, index, path, line) for index, (line, row) in enumerate(_rows(path))]
        expected = expected_rows(own, subject, SUBJECTS[subject][1])
        check_rows(path, len(rows), expected, name=f"{NAME} (`{subject}`)")
        samples += rows
    return samples


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    return json_lines(path, name=NAME)


def _file(folder: Path, subject: str) -> Path:
    places = [folder / inner / f"{subject}.jsonl" for inner in ("data", "")]
    return next((path for path in places if path.is_file()), places[0])


def _sample(row: dict[str, Any], subject: str, index: int, path: Path, line: int) -> Sample:
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(each, str) for each in answers):
        raise DataError(
            f"`answers` is {shown(answers)}, but must be a list of texts, at least one.", path=path, line=line
        )
    question = field_of(row, "input", path, line)
    row_id = str(row.get("_id", index))
    return Sample(NAME, subject, index, question, answer=BETWEEN.join(answers), row_id=row_id)


def is_here(folder: Path) -> bool:
    """Say whether a folder holds LongBench."""
    return any(_file(folder, subject).is_file() for subject in SUBJECTS)


# ---- prompts ----


def read_config(folder: Path, name: str, subjects: Sequence[str], kind: type) -> dict[str, Any]:
    """Read one of the two files that say how a data set is asked.

    Args:
        folder: holds it, in ``config`` or ``LongBench/config``.
        name: of the file.
        subjects: that it must have a value for.
        kind: of the values.

    Raises:
        DataError: it is missing, no JSON object, or lacks a subject.
    """
    places = [folder / inner / name for inner in ("config", "LongBench/config", "")]
    path = next((each for each in places if each.is_file()), places[0])
    try:
        values = json.loads(read_text(path, name=NAME))
    except (ValueError, RecursionError) as error:
        raise DataError(f"no JSON ({error}). {WAY_OUT.format(name=NAME)}", path=path) from None
    for subject in subjects:
        value = values.get(subject) if isinstance(values, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(f"`{subject}` is {shown(value)}, but must be a {kind.__name__}.", path=path)
    return values


def zero_shot(ask: Ask) -> PreparedProtocol:
    """Ask about a text in the published words of its data set."""
    prompts = read_config(ask.folder, PROMPTS, ask.subjects, str)
    lengths = read_config(ask.folder, LENGTHS, ask.subjects, int)
    for subject in ask.subjects:
        if not 1 <= lengths[subject] <= MAX_ANSWER_TOKENS or "{context}" not in prompts[subject]:
            raise DataError(
                f"the prompt of `{subject}` must name {{context}}, and its answer may have 1 to"
                f" {MAX_ANSWER_TOKENS} tokens, but {LENGTHS} has {lengths[subject]}."
                f" {WAY_OUT.format(name=NAME)}",
                path=ask.folder,
            )
    contexts = {
        (subject, index): field_of(row, "context", path, line)
        for subject in ask.subjects
        for path in (_file(ask.folder, subject),)
        for index, (line, row) in enumerate(_rows(path))
    }

    def asked(sample: Sample, context: str) -> Prompt:
        values = {"context": context, "input": sample.question}
        text = _FIELD.sub(lambda found: values[found[1]], prompts[sample.subject])
        return text_prompt(text, num_fewshot=0, is_chat=ask.is_chat)

    return PreparedProtocol(
        kind=GENERATE,
        rules={"overlap": Rule("the whole answer; F1 over words, dureader ROUGE-L", _whole, grade=_grade)},
        write=lambda sample, num_fewshot: asked(sample, contexts[sample.key]),
        limits=Limits(max(lengths[subject] for subject in ask.subjects)),
        max_new_tokens_of=lambda sample: lengths[sample.subject],
        shorten=lambda sample, count: asked(sample, without_middle(contexts[sample.key], count)),
        longest=lambda sample: len(contexts[sample.key]),
    )


def without_middle(text: str, count: int) -> str:
    """Return the beginning and the end of a text, half of the characters kept from each.

    >>> without_middle("abcdefgh", 5), without_middle("abc", 3), without_middle("abc", 0)
    ('abcgh', 'abc', '')
    """
    if count >= len(text):
        return text
    end = count // 2
    return text[: count - end] + (text[-end:] if end else "")


def _whole(text: str, sample: Sample) -> str | None:
    del sample
    return text.strip() or None


def _grade(extracted: str, sample: Sample) -> float:
    grade = GRADES.get(sample.subject, overlap.f1_en)
    return max(grade(extracted, reference) for reference in sample.answer.split(BETWEEN))


LONGBENCH = Benchmark(
    name=NAME,
    title="LongBench QA",
    licence="MIT",
    splits=(SPLIT,),
    subjects=tuple(SUBJECTS),
    protocols={"zero_shot": zero_shot},
    chat_protocol="zero_shot",
    base_protocol="zero_shot",
    groups=lambda split: Groups(
        headline=MACRO,
        categories={subject: category for subject, (category, _) in SUBJECTS.items()},
        category_average=MACRO,
    ),
    is_here=is_here,
    load=load,
    folder_names=(NAME, "LongBench"),
)
