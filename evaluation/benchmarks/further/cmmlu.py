"""CMMLU: 67 subjects of Chinese exams, four options (Li et al. 2023, arXiv:2306.09212).

Prompts and the official rule as in haonan-li/CMMLU @ d6e7b71, ``src/mp_utils.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evaluation.backend import Limits
from evaluation.benchmarks.benchmark import (
    Ask,
    Benchmark,
    check_rows,
    expected_rows,
    sample_set_rows,
    subject_table,
)
from evaluation.benchmarks.multiple_choice import (
    COT_TOKENS,
    OFFICIAL,
    TEXT_RULES,
    block,
    check_letter,
    csv_rows,
    letter_protocol,
)
from evaluation.extraction import cmmlu as cmmlu_rules
from evaluation.fewshot import Exemplar, text_prompt
from evaluation.metrics import MACRO, Groups
from evaluation.sample import LETTERS, Prompt, Sample
from evaluation.task import GENERATE, PreparedProtocol, Rule
from glmtune.errors import DataError

NAME = "cmmlu"
SUBJECTS = subject_table(NAME)
CHINA = tuple(subject for subject, entry in SUBJECTS.items() if entry.get("china"))
DEV_ROWS = 5
SPLITS = ("test", "dev")
LABEL = "题目："
CUE = "\n答案是："
STEPS_CUE = "\n逐步分析并给出答案选项。"
_COLUMNS = ["Question", *LETTERS, "Answer"]


def header(subject: str) -> str:
    """Return the line before exemplars, with the subject's Chinese name."""
    return f"以下是关于{SUBJECTS[subject]['chinese']}的单项选择题，请直接给出正确答案的选项。\n\n"


def header_with_steps(subject: str) -> str:
    """Return the line before a question that is to be analysed first."""
    return f"以下是关于{SUBJECTS[subject]['chinese']}的单项选择题，请分析并选出正确答案。\n\n"


def load(folder: Path, split: str, subjects: Sequence[str]) -> list[Sample]:
    """Read a split of the CSV release (a nameless first column, ``Question``, the options, ``Answer``).

    Args:
        folder: holds ``test/SUBJECT.csv`` and ``dev/SUBJECT.csv`` (or ``data`` with these, as in the
            repository).
        split: ``test`` or ``dev``.
        subjects: whose questions to read.

    Raises:
        DataError: a file is missing, a row is malformed, or the number of rows is not the official one.
    """
    folder = folder / "data" if (folder / "data" / split).is_dir() else folder
    own = sample_set_rows(folder, split)
    samples: list[Sample] = []
    for subject in subjects:
        path = folder / split / f"{subject}.csv"
        head, *rows = csv_rows(path, name=NAME) or [[]]
        if head[1:] != _COLUMNS:
            raise DataError(
                f"the header line is {','.join(head)!r}, but it must be {',' + ','.join(_COLUMNS)!r}.",
                path=path,
                line=1,
            )
        expected = DEV_ROWS if split == "dev" else SUBJECTS[subject]["test"]
        check_rows(path, len(rows), expected_rows(own, subject, expected), name=NAME)
        for index, (row_id, question, *choices, answer) in enumerate(rows):
            check_letter(answer, path, index + 2, name=NAME)
            samples.append(Sample(NAME, subject, index, question, tuple(choices), answer, row_id=row_id))
    return samples


def is_here(folder: Path) -> bool:
    """Say whether a folder holds CMMLU; MMLU and C-Eval name their files otherwise (``SUBJECT_test.csv``)."""
    files = (path for root in (folder, folder / "data") for path in root.glob("test/*.csv"))
    return any(path.stem in SUBJECTS for path in files)


def ask_for_letter(sample: Sample) -> str:
    """Return question and options with the cue for the answer."""
    return f"{LABEL}{block(sample)}{CUE}"


def few_shot_direct(ask: Ask) -> PreparedProtocol:
    """Five dev exemplars with their letters, then the letters' probabilities (the paper's tables)."""
    shots: dict[str, list[Exemplar]] = {}
    for row in load(ask.folder, "dev", ask.subjects):
        shots.setdefault(row.subject, []).append(Exemplar(ask_for_letter(row), row.answer))
    return letter_protocol(shots, header, ask_for_letter, is_chat=ask.is_chat, choices=tuple(LETTERS))


def zero_shot_cot(ask: Ask) -> PreparedProtocol:
    """Analyse, then name the letter, which is read from the text (chat models)."""

    def write(sample: Sample, num_fewshot: int) -> Prompt:
        del num_fewshot
        text = f"{header_with_steps(sample.subject)}{LABEL}{block(sample)}{STEPS_CUE}"
        return text_prompt(text, num_fewshot=0, is_chat=ask.is_chat)

    rules = {
        OFFICIAL: Rule("the repository's regular expressions, nothing made up", cmmlu_rules.official),
        **{name: TEXT_RULES[name] for name in ("strict", "loose")},
    }
    return PreparedProtocol(kind=GENERATE, rules=rules, write=write, limits=Limits(COT_TOKENS))


def groups(split: str) -> Groups:
    """Return CMMLU's averages: means over subjects, as its script prints them.

    The subjects it calls specific to China belong to a category each and form an average of their own
    besides.
    """
    del split
    return Groups(
        headline=MACRO,
        categories={subject: entry["category"] for subject, entry in SUBJECTS.items()},
        category_average=MACRO,
        further={"China specific": [[subject] for subject in CHINA]},
    )


CMMLU = Benchmark(
    name=NAME,
    title="CMMLU",
    licence="CC BY-NC-SA 4.0 (non-commercial)",
    splits=SPLITS,
    subjects=tuple(SUBJECTS),
    protocols={"few_shot_direct": few_shot_direct, "zero_shot_cot": zero_shot_cot},
    chat_protocol="few_shot_direct",
    base_protocol="few_shot_direct",
    groups=groups,
    is_here=is_here,
    load=load,
    folder_names=("cmmlu", "CMMLU"),
)
