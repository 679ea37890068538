"""The exam that ships with glmtune: short keyed questions that show what a tuned model still answers.

It is no measure of ability: every question is easy, in Chinese or English, and its key is fair to any model.
What counts is how many a model answers before and after tuning (``glmtune compare``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from evaluation.backend import Limits
from evaluation.benchmarks.benchmark import (
    Ask,
    Benchmark,
    check_rows,
    expected_rows,
    json_lines,
    sample_set_rows,
)
from evaluation.benchmarks.multiple_choice import block
from evaluation.extraction import keyed
from evaluation.extraction.text import RUN_ON
from evaluation.metrics import MICRO, Groups
from evaluation.sample import LETTERS, Prompt, Sample
from evaluation.task import GENERATE, PreparedProtocol, Rule
from glmtune.errors import DataError, unknown_name
from glmtune.messages import Message
from glmtune.storage.records import Record, Text, shown, validated

NAME = "exam"
FILE = "exam.jsonl"
SPLIT = "test"
ROWS = {
    "arithmetic_zh": 84,
    "arithmetic_en": 60,
    "facts_zh": 98,
    "facts_en": 72,
    "reasoning_en": 24,
    "chat_zh": 48,
    "chat_en": 15,
    "choice_zh": 12,
    "choice_en": 12,
}
"""Questions of each subject: a category in one language, so that scores and settings know both."""
CATEGORIES = tuple(dict.fromkeys(subject.rpartition("_")[0] for subject in ROWS))
MAX_NEW_TOKENS = 256
"""Answers are short, but a chat model may write a calculation out before its number."""
LETTER_ONLY = {"zh": "只回答选项字母。", "en": "Answer with the letter only."}
LABELS = {"zh": ("问题：", "回答："), "en": ("Q: ", "A: ")}
"""Before a question and its answer, where a base model continues plain text."""
WAY_OUT = (
    "The exam comes with glmtune: leave `benchmark.data_dir` out to use that one. Questions of your own in"
    " this layout need a sample_set.json saying how many rows each subject has; see data/ceval_sample."
)
RULES = {
    "keyed": Rule(
        "by the rule of the question: its number, its letter, or a form of its key",
        keyed.extract,
        keyed.is_right,
    )
}


class _Row(Record):
    """One line of the file."""

    question: Annotated[str, Field(min_length=1, description="a text")]
    answer: Annotated[str, Field(min_length=1, description="a text")]
    rule: Annotated[Literal["number", "letter", "contains"], Field(description="number, letter or contains")]
    category: Text
    language: Annotated[Literal["zh", "en"], Field(description="zh or en")]
    history: Annotated[
        list[Annotated[list[str], Field(min_length=2, max_length=2)]],
        Field(description="a list of [question, answer] pairs"),
    ] = Field(default_factory=list)
    choices: Annotated[list[str], Field(description="the texts of four options")] = Field(
        default_factory=list
    )


def load(folder: Path, split: str, subjects: Sequence[str]) -> list[Sample]:
    """Read the questions of some subjects.

    Args:
        folder: holds ``exam.jsonl``.
        split: ``test``, the only one.
        subjects: such as ``facts_zh``; rows of others are left out.

    Raises:
        DataError: the file is missing, a row is malformed, or a subject has not the rows it must have.
    """
    own = sample_set_rows(folder, split)
    path = folder / FILE
    found: dict[str, list[Sample]] = {subject: [] for subject in ROWS}
    for line, values in json_lines(path, name=NAME, way_out=WAY_OUT):
        try:
            row = validated(_Row, values)
            subject = _subject(row)
            found[subject].append(_sample(row, subject, len(found[subject])))
        except ValueError as error:
            raise DataError(
                f"this question of the exam cannot be used: {str(error).rstrip('.')}.", path=path, line=line
            ) from None
    for subject in subjects:
        expected = expected_rows(own, subject, ROWS[subject])
        check_rows(path, len(found[subject]), expected, name=f"the exam (`{subject}`)", way_out=WAY_OUT)
    return [sample for subject in subjects for sample in found[subject]]


def _subject(row: _Row) -> str:
    subject = f"{row.category}_{row.language}"
    if subject not in ROWS:
        raise ValueError(unknown_name("`category`", row.category, CATEGORIES))
    return subject


def _sample(row: _Row, subject: str, index: int) -> Sample:
    """Return a question whose key its rule can find; a key that none can would count as wrong for ever."""
    has_options = row.rule == keyed.LETTER
    if len(row.choices) != (len(LETTERS) if has_options else 0):
        raise ValueError(
            f"`rule` is `{row.rule}` and `choices` has {len(row.choices)}; `letter` needs four, others none"
        )
    if has_options and row.answer not in LETTERS:
        raise ValueError(f"`answer` is {shown(row.answer)}, but must be one of {', '.join(LETTERS)}")
    sample = Sample(
        NAME,
        subject,
        index,
        row.question,
        tuple(row.choices),
        row.answer,
        row_id=str(index),
        history=tuple(
            Message(role, text)
            for pair in row.history
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ),
        rule=row.rule,
    )
    # The key is read as if a model had said it, by the same rule that will read the models.
    key = keyed.forms(row.answer)[-1]
    said = keyed.extract(key, sample)
    if said is None or not keyed.is_right(said, sample):
        raise ValueError(
            f"`answer` is {shown(row.answer)}, but `rule={row.rule}` does not find that in {shown(key)}"
        )
    return sample


def zero_shot(ask: Ask) -> PreparedProtocol:
    """Ask the bare question, after what was said before it; base models continue labelled plain text."""

    def write(sample: Sample, num_fewshot: int) -> Prompt:
        del num_fewshot
        language = sample.subject.rpartition("_")[2]
        question = sample.question
        if sample.choices:
            question = f"{block(sample)}\n{LETTER_ONLY[language]}"
        turns = (*sample.history, Message("user", question))
        if ask.is_chat:
            return Prompt(turns=turns)
        labels = LABELS[language]
        lines = [f"{labels[turn.role == 'assistant']}{turn.content}" for turn in turns]
        return Prompt(text="\n".join([*lines, labels[1].rstrip()]))

    return PreparedProtocol(
        kind=GENERATE, rules=RULES, write=write, limits=Limits(MAX_NEW_TOKENS, stop=RUN_ON)
    )


def groups(split: str) -> Groups:
    """Return the exam's averages: every question weighs the same, and both languages form a category."""
    del split
    return Groups(headline=MICRO, categories={subject: subject.rpartition("_")[0] for subject in ROWS})


EXAM = Benchmark(
    name=NAME,
    title="glmtune's exam",
    licence="Apache-2.0 (written for glmtune)",
    splits=(SPLIT,),
    subjects=tuple(ROWS),
    protocols={"zero_shot": zero_shot},
    chat_protocol="zero_shot",
    base_protocol="zero_shot",
    groups=groups,
    is_here=lambda folder: (folder / FILE).is_file(),
    load=load,
    folder_names=(NAME,),
)
