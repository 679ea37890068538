"""BIG-Bench Hard: 23 tasks in 27 files, three worked exemplars each (Suzgun et al. 2022, arXiv:2210.09261).

Prompts, targets and the official rule as in suzgunmirac/BIG-Bench-Hard @ 9ee07bd.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from evaluation.backend import Limits
from evaluation.benchmarks.benchmark import (
    WAY_OUT,
    Ask,
    Benchmark,
    check_rows,
    expected_rows,
    field_of,
    read_text,
    sample_set_rows,
    subject_table,
)
from evaluation.extraction import bbh as bbh_rules
from evaluation.fewshot import Exemplar, FewShot, as_text, text_prompt
from evaluation.metrics import MACRO, Groups
from evaluation.sample import Prompt, Sample
from evaluation.task import GENERATE, PreparedProtocol, Rule
from glmtune.errors import DataError

NAME = "bbh"
SUBJECTS = subject_table(NAME)
SPLIT = "test"
CUE = "\nA: Let's think step by step."
DIRECT_CUE = "\nA:"
ANSWER_IS = "the answer is "
COT_TOKENS = 512
DIRECT_TOKENS = 64
# The canary (a string that marks benchmark data, so that it can be kept out of training sets) and `-----`.
_CANARY_LINES = 2


def load(folder: Path, split: str, subjects: Sequence[str]) -> list[Sample]:
    """Read the items of some tasks.

    Args:
        folder: holds ``bbh/TASK.json``, as the repository does.
        split: ``test``, the only one.
        subjects: the tasks.

    Raises:
        DataError: a file is missing or malformed, or the number of items is not the official one.
    """
    own = sample_set_rows(folder, split)
    samples: list[Sample] = []
    for subject in subjects:
        path = folder / "bbh" / f"{subject}.json"
        try:
            rows = json.loads(read_text(path, name=NAME))["examples"]
            if not isinstance(rows, list):
                raise ValueError("`examples` is no list")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"no JSON object with `examples` ({error}). {WAY_OUT.format(name=NAME)}", path=path
            ) from None
        expected = expected_rows(own, subject, SUBJECTS[subject]["rows"])
        check_rows(path, len(rows), expected, name=NAME)
        for index, row in enumerate(rows):
            question, answer = (field_of(row, key, path, index + 1) for key in ("input", "target"))
            samples.append(Sample(NAME, subject, index, question, answer=answer, row_id=str(index)))
    return samples


def is_here(folder: Path) -> bool:
    """Say whether a folder holds BBH."""
    return any(path.stem in SUBJECTS for path in folder.glob("bbh/*.json"))


def read_exemplars(folder: Path, subject: str) -> tuple[str, list[Exemplar]]:
    """Read a task's description and worked exemplars.

    The first two lines (the canary and ``-----``) are cut; everything else stays as it is, byte by byte.

    Args:
        folder: holds ``cot-prompts/TASK.txt``.
        subject: the task.

    Returns:
        The description and exemplars whose question begins with ``Q: `` and ends with the cue.

    Raises:
        DataError: the file is missing or has no worked exemplars.
    """
    path = folder / "cot-prompts" / f"{subject}.txt"
    lines = read_text(path, name=NAME).rstrip("\n").split("\n", _CANARY_LINES)
    if len(lines) <= _CANARY_LINES or set(lines[1].strip()) != {"-"}:
        raise DataError(
            "a prompt file begins with a canary line and a line of dashes, but this one does not."
            f" {WAY_OUT.format(name=NAME)}",
            path=path,
        )
    description, *shots = lines[_CANARY_LINES].split("\n\nQ: ")
    exemplars = []
    for shot in shots:
        question, cue, answer = shot.partition(CUE)
        if not cue or ANSWER_IS not in answer:
            raise DataError(
                f"an exemplar has no {CUE.strip()!r} or no {ANSWER_IS.strip()!r}."
                f" {WAY_OUT.format(name=NAME)}",
                path=path,
            )
        exemplars.append(Exemplar(f"Q: {question}{CUE}", answer))
    if not exemplars:
        raise DataError(f"no exemplars after the description. {WAY_OUT.format(name=NAME)}", path=path)
    return description, exemplars


def final_answer(worked: str) -> str:
    """Return the answer that a worked exemplar ends in.

    >>> final_answer(" ... So the answer is (B).")
    '(B)'
    """
    return worked.rpartition(ANSWER_IS)[2].strip().removesuffix(".")


def _writer(
    ask: Ask, cue: str, shorten: Callable[[Exemplar], Exemplar]
) -> tuple[Callable[[Sample, int], Prompt], FewShot]:
    read = {subject: read_exemplars(ask.folder, subject) for subject in ask.subjects}
    shots = {subject: [shorten(shot) for shot in exemplars] for subject, (_, exemplars) in read.items()}

    def write(sample: Sample, num_fewshot: int) -> Prompt:
        kept = shots[sample.subject][:num_fewshot]
        text = as_text(read[sample.subject][0] + "\n\n", kept, f"Q: {sample.question}{cue}")
        return text_prompt(text, num_fewshot=len(kept), is_chat=ask.is_chat)

    return write, FewShot(shots, lambda sample: f"Q: {sample.question}{cue}")


def few_shot_cot(ask: Ask) -> PreparedProtocol:
    """Three worked exemplars as the repository gives them (all GLM tables)."""
    write, few_shot = _writer(ask, CUE, lambda shot: shot)
    rules = {
        "official": _by_task(bbh_rules.official, "text after the first `the answer is `, letter by letter"),
        "normalized": _by_task(bbh_rules.normalized, "last stated answer in the task's form", forgiving=True),
        "loose": _by_task(bbh_rules.loose, "stated answer, else the last line", forgiving=True),
    }
    return PreparedProtocol(
        kind=GENERATE,
        rules=rules,
        write=write,
        # A blank line ends no chain of thought: chat models reason in paragraphs.
        limits=Limits(COT_TOKENS, stop=bbh_rules.STOPS),
        num_fewshot=min(map(len, few_shot.exemplars.values())),
        few_shot=few_shot,
    )


def few_shot_direct(ask: Ask) -> PreparedProtocol:
    """The same questions with their answers only."""

    def shorten(shot: Exemplar) -> Exemplar:
        question = shot.question.removesuffix(CUE) + DIRECT_CUE
        return Exemplar(question, f" {final_answer(shot.answer)}")

    write, few_shot = _writer(ask, DIRECT_CUE, shorten)
    rules = {
        "official": Rule("the whole completion, letter by letter", bbh_rules.official_direct),
        "normalized": _by_task(bbh_rules.normalized_direct, "completion in the task's form", forgiving=True),
    }
    return PreparedProtocol(
        kind=GENERATE,
        rules=rules,
        write=write,
        limits=Limits(DIRECT_TOKENS, stop=("\n",) if not ask.is_chat else bbh_rules.STOPS),
        num_fewshot=min(map(len, few_shot.exemplars.values())),
        few_shot=few_shot,
    )


def _by_task(
    rule: Callable[[str], Callable[[str, Sample], str | None]], about: str, *, forgiving: bool = False
) -> Rule:
    by_kind = {kind: rule(kind) for kind in bbh_rules.FORMS}

    def extract(text: str, sample: Sample) -> str | None:
        return by_kind[SUBJECTS[sample.subject]["kind"]](text, sample)

    if not forgiving:
        return Rule(about, extract)
    return Rule(about, extract, bbh_rules.is_the_same_answer, version=2)


def groups(split: str) -> Groups:
    """Return BBH's averages: over the 27 files, and over the paper's 23 tasks (parts averaged first).

    The paper averages over 23; which average the GLM tables hold is not said. For chains of thought the two
    lie some 0.2 points apart, for direct answers four, so both are printed.
    """
    del split
    tasks: dict[str, list[str]] = {}
    for subject, entry in SUBJECTS.items():
        tasks.setdefault(entry.get("task", subject), []).append(subject)
    return Groups(headline=MACRO, further={"accuracy_macro_23": list(tasks.values())})


BBH = Benchmark(
    name=NAME,
    title="BIG-Bench Hard",
    licence="MIT",
    splits=(SPLIT,),
    subjects=tuple(SUBJECTS),
    protocols={"few_shot_cot": few_shot_cot, "few_shot_direct": few_shot_direct},
    chat_protocol="few_shot_cot",
    base_protocol="few_shot_cot",
    groups=groups,
    is_here=is_here,
    load=load,
    folder_names=("bbh", "BIG-Bench-Hard"),
)
