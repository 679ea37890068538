"""MMLU: 57 subjects of English exams, four options (Hendrycks et al. 2021, arXiv:2009.03300).

Prompts and rules as in hendrycks/test @ 4450500f; categories as in THUDM/GLM-130B @ 212215c (anatomy in
STEM).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evaluation.benchmarks.benchmark import Ask, Benchmark, check_rows, sample_set_rows, subject_table
from evaluation.benchmarks.multiple_choice import (
    block,
    check_letter,
    csv_rows,
    letter_protocol,
    own_csv_subjects,
    two_stage_protocol,
)
from evaluation.fewshot import Exemplar
from evaluation.metrics import MICRO, Groups
from evaluation.sample import LETTERS, Prompt, Sample
from evaluation.task import PreparedProtocol
from glmtune.messages import Message

NAME = "mmlu"
SUBJECTS = subject_table(NAME)
DEV_ROWS = 5
SPLITS = ("test", "val", "dev")
# No blank behind: the tokens compared are ` A` to ` D`, which bring theirs.
CUE = "\nAnswer:"
STEPS = " Let's think step by step."
# The cue of Kojima et al. 2022 (arXiv:2205.11916): the published GLM tables name no English one.
EXTRACTION_CUE = "\nTherefore, among A through D, the answer is"


def header(subject: str) -> str:
    """Return the line before few-shot exemplars; the original code puts two blanks before the subject."""
    return (
        f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
    )


def load(folder: Path, split: str, subjects: Sequence[str]) -> list[Sample]:
    """Read a split of the CSV release (no header line, six cells).

    Args:
        folder: holds ``test/SUBJECT_test.csv`` and the like (or ``data`` with these, as in ``data.tar``).
        split: ``dev``, ``val`` or ``test``.
        subjects: whose questions to read.

    Raises:
        DataError: a file is missing, a row is malformed, or the number of rows is not the official one.
    """
    folder = folder / "data" if (folder / "data" / split).is_dir() else folder
    own = sample_set_rows(folder, split)
    samples: list[Sample] = []
    for subject in subjects:
        path = folder / split / f"{subject}_{split}.csv"
        rows = csv_rows(path, name=NAME, columns=6)
        known = SUBJECTS.get(subject)
        expected = None if known is None else DEV_ROWS if split == "dev" else known[split]
        if own is not None:
            expected = own.get(subject, None if known is None else 0)
        check_rows(path, len(rows), expected, name=NAME)
        for index, (question, *choices, answer) in enumerate(rows):
            check_letter(answer, path, index + 1, name=NAME)
            samples.append(Sample(NAME, subject, index, question, tuple(choices), answer, row_id=str(index)))
    return samples


def is_here(folder: Path) -> bool:
    """Say whether a folder holds MMLU."""
    roots = (folder, folder / "data")
    files = (path for root in roots for split in SPLITS for path in root.glob(f"{split}/*_{split}.csv"))
    return any(path.stem.rsplit("_", 1)[0] in SUBJECTS for path in files)


def ask_for_letter(sample: Sample) -> str:
    """Return question and options with the cue for the answer, without a blank after it."""
    return block(sample) + CUE


def few_shot_direct(ask: Ask) -> PreparedProtocol:
    """Five dev exemplars with their letters, then the letters' probabilities (the original protocol)."""
    shots: dict[str, list[Exemplar]] = {}
    for row in load(ask.folder, "dev", ask.subjects):
        shots.setdefault(row.subject, []).append(Exemplar(ask_for_letter(row), f" {row.answer}"))
    # An answer of a chat begins without a blank.
    choices = tuple(LETTERS) if ask.is_chat else tuple(f" {letter}" for letter in LETTERS)
    return letter_protocol(shots, header, ask_for_letter, is_chat=ask.is_chat, choices=choices)


def zero_shot_cot(ask: Ask) -> PreparedProtocol:
    """Two stages as for C-Eval: answer the bare question, then name the letter after a cue (chat models)."""

    def first(sample: Sample) -> Prompt:
        if ask.is_chat:
            return Prompt(turns=(Message("user", block(sample)),))
        return Prompt(text=header(sample.subject) + ask_for_letter(sample) + STEPS)

    def second(sample: Sample, completion: str) -> Prompt:
        if ask.is_chat:
            return Prompt(turns=(Message("user", block(sample) + completion + EXTRACTION_CUE),))
        return Prompt(text=(first(sample).text or "") + completion + EXTRACTION_CUE)

    choices = tuple(LETTERS) if ask.is_chat else tuple(f" {letter}" for letter in LETTERS)
    return two_stage_protocol(first, second, choices=choices)


def groups(split: str) -> Groups:
    """Return MMLU's averages: every question weighs the same; Hendrycks' two categories beside GLM's.

    The four published categories of ChatGLM2-6B give its printed average of 45.46 only so, and only with
    anatomy in STEM; with Hendrycks' categories they give 45.56. ``tests/evaluation/test_metrics.py``
    recounts it.
    """
    del split
    glm = {subject: entry["category"] for subject, entry in SUBJECTS.items()}
    hendrycks = {subject: entry.get("hendrycks", entry["category"]) for subject, entry in SUBJECTS.items()}
    return Groups(
        headline=MICRO,
        categories=glm,
        category_average=MICRO,
        official=frozenset(SUBJECTS),
        further_micro={
            "STEM (anatomy in Other, as Hendrycks)": [s for s, c in hendrycks.items() if c == "STEM"],
            "Other (with anatomy, as Hendrycks)": [s for s, c in hendrycks.items() if c == "Other"],
        },
    )


MMLU = Benchmark(
    name=NAME,
    title="MMLU",
    licence="MIT",
    splits=SPLITS,
    subjects=tuple(SUBJECTS),
    protocols={"zero_shot_cot": zero_shot_cot, "few_shot_direct": few_shot_direct},
    chat_protocol="zero_shot_cot",
    base_protocol="few_shot_direct",
    groups=groups,
    is_here=is_here,
    load=load,
    folder_names=("mmlu", "MMLU"),
    own_subjects=lambda folder, split: own_csv_subjects(
        (folder / "data" if (folder / "data" / split).is_dir() else folder) / split, split, SUBJECTS
    ),
    published_repeats=frozenset({("val", "college_physics", 5)}),
)
