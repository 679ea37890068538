"""C-Eval: 52 subjects of Chinese exams, four options (Huang et al. 2023, arXiv:2305.08322).

Prompts and rules as in hkust-nlp/ceval @ cba65ae; the two-stage protocol as in THUDM/ChatGLM2-6B @ cb8e8b4,
``evaluation/evaluate_ceval.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evaluation.backend import Limits
from evaluation.benchmarks.benchmark import (
    Ask,
    Benchmark,
    check_rows,
    field_of,
    json_lines,
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
    own_csv_subjects,
    two_stage_protocol,
)
from evaluation.extraction import letters as letter_rules
from evaluation.fewshot import Exemplar, FewShot, as_text, turns_prompt
from evaluation.metrics import MACRO, MICRO, Groups
from evaluation.sample import LETTERS, Prompt, Sample
from evaluation.task import GENERATE, PreparedProtocol, Rule
from glmtune.errors import DataError
from glmtune.messages import Message
from glmtune.storage.records import shown

NAME = "ceval"
SUBJECTS = subject_table(NAME)
DEV_ROWS = 5
HARD = tuple(subject for subject, entry in SUBJECTS.items() if entry.get("hard"))
CUE = "\n答案："
# What follows 答案： in the repository's chain-of-thought exemplars; a base model is handed it as the
# beginning of its own answer.
STEPS = "让我们一步一步思考，\n"
# Of ChatGLM2's script: the letter is scored right behind it.
EXTRACTION_CUE = "\n综上所述，ABCD中正确的选项是："
_HEADER = ["id", "question", *LETTERS]


def instruction(subject: str) -> str:
    """Return the line before few-shot exemplars, with the subject's Chinese name (an own subject has one).

    The README of the repository shows the Chinese name; its code fills in the English name of the file.
    """
    name = SUBJECTS[subject]["chinese"] if subject in SUBJECTS else subject
    return f"以下是中国关于{name}考试的单项选择题，请选出其中的正确答案。\n\n"


def load(folder: Path, split: str, subjects: Sequence[str]) -> list[Sample]:
    """Read a split from the CSV release or from ChatGLM2's JSON lines.

    Args:
        folder: holds ``val/SUBJECT_val.csv`` or ``val/CATEGORY/SUBJECT.jsonl`` (or ``CEval`` with these).
        split: ``dev``, ``val`` or ``test``.
        subjects: whose questions to read.

    Raises:
        DataError: a file is missing, a row is malformed, or the number of rows is not the official one.
    """
    folder = folder / "CEval" if (folder / "CEval").is_dir() else folder
    own = sample_set_rows(folder, split)
    is_json = any(folder.glob(f"{split}/*/*.jsonl"))
    if split == "dev" and not (folder / "dev").is_dir() and any(folder.glob("*/*/*.jsonl")):
        raise DataError(
            "ChatGLM2's layout of C-Eval has no dev split, so there are no exemplars. Use the CSV release, or"
            " `protocol=zero_shot_cot`.",
            path=folder,
        )
    samples: list[Sample] = []
    for subject in subjects:
        known = SUBJECTS.get(subject)
        if is_json and known is not None:
            path = folder / split / known["category"].replace(" ", "_") / f"{subject}.jsonl"
            rows = _read_json(path, subject)
        else:
            path = folder / split / f"{subject}_{split}.csv"
            rows = _read_csv(path, subject, is_labelled=split != "test")
        expected = None if known is None else DEV_ROWS if split == "dev" else known[split]
        if own is not None:
            expected = own.get(subject, None if known is None else 0)
        check_rows(path, len(rows), expected, name=NAME)
        samples += rows
    return samples


def _read_csv(path: Path, subject: str, *, is_labelled: bool) -> list[Sample]:
    head, *rows = _table(path)
    named = {name: place for place, name in enumerate(head)}

    def cell(row: list[str], name: str) -> str:
        return row[named[name]] if name in named else ""

    samples = []
    for index, row in enumerate(rows):
        answer = cell(row, "answer")
        if answer or is_labelled:
            check_letter(answer, path, index + 2, name=NAME)
        sample = Sample(
            benchmark=NAME,
            subject=subject,
            index=index,
            question=cell(row, "question"),
            choices=tuple(cell(row, letter) for letter in LETTERS),
            answer=answer,
            row_id=cell(row, "id"),
            explanation=cell(row, "explanation"),
        )
        samples.append(sample)
    return samples


def _table(path: Path) -> list[list[str]]:
    rows = csv_rows(path, name=NAME)
    head = rows[0] if rows else []
    absent = [name for name in _HEADER if name not in head]
    if absent:
        raise DataError(
            f"the header line is {','.join(head)!r}, but it must have {','.join(_HEADER)} (and answer, where"
            f" there are answers); absent: {', '.join(absent)}.",
            path=path,
            line=1,
        )
    return rows


def _read_json(path: Path, subject: str) -> list[Sample]:
    samples = []
    for index, (line, row) in enumerate(json_lines(path, name=NAME)):
        parts = _question_and_options(field_of(row, "inputs_pretokenized", path, line))
        if parts is None:
            raise DataError("`inputs_pretokenized` has no options A. to D. in lines.", path=path, line=line)
        label, targets = row.get("label"), row.get("targets_pretokenized")
        if not isinstance(label, int) or label not in range(4) or not isinstance(targets, list):
            raise DataError(
                f"`label` is {label!r} and `targets_pretokenized` {targets!r}, but they must be a number from"
                " 0 to 3 and a list (of an empty text where there is no answer).",
                path=path,
                line=line,
            )
        sample = Sample(
            benchmark=NAME,
            subject=subject,
            index=index,
            question=parts[0],
            choices=parts[1:],
            answer=LETTERS[label] if any(targets) else "",
            row_id=shown(row.get("id", index)).strip('"'),
        )
        samples.append(sample)
    return samples


def _question_and_options(text: str) -> tuple[str, ...] | None:
    """Part question and options, which ChatGLM2's JSON lines hold as one text."""
    options: list[str] = []
    # From the end, each at its last mark: a question may hold such lines of its own.
    for letter in reversed(LETTERS):
        text, mark, option = text.rpartition(f"\n{letter}. ")
        if not mark:
            return None
        options.insert(0, option)
    return (text, *options)


def is_here(folder: Path) -> bool:
    """Say whether a folder holds C-Eval in one of its layouts."""
    roots = (folder, folder / "CEval")
    patterns = ("dev/*_dev.csv", "val/*_val.csv", "test/*_test.csv", "val/*/*.jsonl", "test/*/*.jsonl")
    files = (path for root in roots for pattern in patterns for path in root.glob(pattern))
    return any(path.stem.rsplit("_", 1)[0] in SUBJECTS or path.stem in SUBJECTS for path in files)


def ask_for_letter(sample: Sample) -> str:
    """Return question and options with the cue for the answer."""
    return block(sample) + CUE


def has_hard_subjects(folder: Path) -> bool:
    """Say whether a folder holds some of C-Eval Hard."""
    roots = (folder, folder / "CEval")
    names = [f"{split}/{subject}_{split}.csv" for split in ("val", "test") for subject in HARD]
    names += [f"{split}/STEM/{subject}.jsonl" for split in ("val", "test") for subject in HARD]
    return any((root / name).is_file() for root in roots for name in names)


def _dev(ask: Ask) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in load(ask.folder, "dev", ask.subjects):
        found.setdefault(sample.subject, []).append(sample)
    return found


def few_shot_direct(ask: Ask) -> PreparedProtocol:
    """Five dev exemplars with their letters, then the letters' probabilities (base models)."""
    shots = {
        subject: [Exemplar(ask_for_letter(row), row.answer) for row in rows]
        for subject, rows in _dev(ask).items()
    }
    return letter_protocol(shots, instruction, ask_for_letter, is_chat=ask.is_chat, choices=tuple(LETTERS))


def few_shot_cot(ask: Ask) -> PreparedProtocol:
    """Five dev exemplars with their explanations; the letter is read from the completion."""
    shots = {
        subject: [
            Exemplar(ask_for_letter(row), f"{STEPS}{row.explanation}\n所以答案是{row.answer}。")
            for row in rows
        ]
        for subject, rows in _dev(ask).items()
    }

    def write(sample: Sample, num_fewshot: int) -> Prompt:
        kept = shots[sample.subject][:num_fewshot]
        if ask.is_chat:
            return turns_prompt(instruction(sample.subject), kept, ask_for_letter(sample))
        text = as_text(instruction(sample.subject), kept, ask_for_letter(sample) + STEPS)
        return Prompt(text=text, num_fewshot=len(kept))

    rules = {OFFICIAL: Rule(TEXT_RULES["script"].about, letter_rules.script)}
    rules |= {name: rule for name, rule in TEXT_RULES.items() if name != "script"}
    return PreparedProtocol(
        kind=GENERATE,
        rules=rules,
        write=write,
        # A base model goes on with another exemplar, which a blank line precedes; in a chat the template ends
        # the answer, and its reasoning may have paragraphs.
        limits=Limits(COT_TOKENS, stop=() if ask.is_chat else ("\n\n",)),
        num_fewshot=min(map(len, shots.values())),
        few_shot=FewShot(shots, ask_for_letter),
    )


def zero_shot_cot(ask: Ask) -> PreparedProtocol:
    """ChatGLM2's two stages: answer the bare question, then name the letter after a cue (chat models)."""

    def first(sample: Sample) -> Prompt:
        if ask.is_chat:
            return Prompt(turns=(Message("user", block(sample)),))
        # Published tables ask base models with exemplars; without, this is the few-shot prompt less its
        # exemplars.
        return Prompt(text=instruction(sample.subject) + ask_for_letter(sample) + STEPS)

    def second(sample: Sample, completion: str) -> Prompt:
        # The completion stands inside the user's turn, with nothing between it and the options, as the script
        # has it; as a turn of the assistant it would score otherwise.
        if ask.is_chat:
            return Prompt(turns=(Message("user", block(sample) + completion + EXTRACTION_CUE),))
        before = first(sample).text or ""
        return Prompt(text=before + completion + EXTRACTION_CUE)

    return two_stage_protocol(first, second, choices=tuple(LETTERS))


def groups(split: str) -> Groups:
    """Return C-Eval's averages.

    The leaderboard prints the mean over subjects: the published categories of ChatGLM2-6B, weighted by their
    20, 10, 11 and 11 subjects, give 50.09 for the printed 50.1 (over questions it would be 50.2). ChatGLM2's
    script, run on val, weighs every question alike: its 53.57 is 721 of 1,346.
    ``tests/evaluation/test_metrics.py`` recounts both.
    """
    return Groups(
        headline=MICRO if split == "val" else MACRO,
        categories={subject: entry["category"] for subject, entry in SUBJECTS.items()},
        category_average=MACRO,
        further={"hard": [[subject] for subject in HARD]},
        official=frozenset(SUBJECTS),
    )


CEVAL = Benchmark(
    name=NAME,
    title="C-Eval",
    licence="CC BY-NC-SA 4.0 (non-commercial)",
    splits=("val", "test", "dev"),
    subjects=tuple(SUBJECTS),
    protocols={
        "zero_shot_cot": zero_shot_cot,
        "few_shot_direct": few_shot_direct,
        "few_shot_cot": few_shot_cot,
    },
    chat_protocol="zero_shot_cot",
    base_protocol="few_shot_direct",
    groups=groups,
    is_here=is_here,
    load=load,
    folder_names=("ceval", "CEval", "ceval_chatglm2"),
    own_subjects=lambda folder, split: own_csv_subjects(
        (folder / "CEval" if (folder / "CEval").is_dir() else folder) / split, split, SUBJECTS
    ),
)

CEVAL_HARD = replace(
    CEVAL,
    name="ceval_hard",
    title="C-Eval Hard",
    subjects=HARD,
    # The paper has the mean of the eight subjects' accuracies, on both splits.
    groups=lambda split: Groups(headline=MACRO, official=frozenset(HARD)),
    is_here=has_hard_subjects,
    own_subjects=None,
    part_of=NAME,
)
