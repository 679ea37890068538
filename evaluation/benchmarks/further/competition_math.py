"""MATH: competition problems whose answer is a formula (Hendrycks et al. 2021, arXiv:2103.03874).

``math500`` are the 500 problems of Lightman et al. 2023 (arXiv:2305.20050) that most figures are of today;
``math`` reads all 5,000 in the layout of the authors' archive, for those who have it. Four exemplars of
Lewkowycz et al. 2022 (arXiv:2206.14858, appendix D) from a file, as ``gsm8k`` has its eight.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from evaluation.extraction import math_answers
from evaluation.extraction.equality import check_extra
from evaluation.fewshot import Exemplar, FewShot, as_text, text_prompt
from evaluation.metrics import MICRO, Groups
from evaluation.sample import Prompt, Sample
from evaluation.task import GENERATE, PreparedProtocol, Rule
from glmtune.errors import DataError

SPLIT = "test"
EXEMPLAR_FILES = ("minerva_exemplars.json", "minerva_math.py")
COT_TOKENS = 2048
"""Solutions are long: the longest of the data set has some 1,700 tokens."""
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""Behind a problem for chat models without exemplars; most published figures are asked with it."""
LAYOUT = ("Problem:\n", "\n\nSolution:")
RULES = {
    "equal": Rule(
        "the last box, else what follows the last `answer is`; equal as formulas (math-verify)",
        math_answers.loose,
        math_answers.is_the_same_formula,
    ),
    "boxed": Rule(
        "the last box; equal as formulas (math-verify)", math_answers.boxed, math_answers.is_the_same_formula
    ),
    "text": Rule("the last box, as text", math_answers.boxed, math_answers.is_the_same_text),
}
MINERVA = Rule(
    "`The final answer is ... I hope it is correct`; equal as formulas (math-verify)",
    math_answers.minerva,
    math_answers.is_the_same_formula,
)


@dataclass(frozen=True, slots=True)
class _Release:
    """One of the two sets: how many problems of each subject, and where they stand."""

    name: str
    rows: Mapping[str, int]
    read: Callable[[Path, str], list[tuple[dict[str, Any], Path, int]]]
    is_here: Callable[[Path], bool]


def _load(release: _Release, folder: Path, split: str, subjects: Sequence[str]) -> list[Sample]:
    own = sample_set_rows(folder, split)
    samples: list[Sample] = []
    for subject in subjects:
        rows = release.read(folder, subject)
        path = rows[0][1] if rows else folder
        expected = expected_rows(own, subject, release.rows[subject])
        check_rows(path, len(rows), expected, name=f"{release.name} (`{subject}`)")
        samples += [
            _sample(release.name, row, subject, index, place, line)
            for index, (row, place, line) in enumerate(rows)
        ]
    return samples


def _sample(name: str, row: dict[str, Any], subject: str, index: int, path: Path, line: int) -> Sample:
    problem, solution = (field_of(row, key, path, line) for key in ("problem", "solution"))
    answer = row["answer"] if isinstance(row.get("answer"), str) else math_answers.last_box(solution)
    if not answer:
        raise DataError("the solution has no closed `\\boxed{}`, which is the answer.", path=path, line=line)
    row_id = str(row.get("unique_id", index))
    return Sample(name, subject, index, problem, answer=answer, row_id=row_id, explanation=solution)


def _of_json_lines(folder: Path, subject: str) -> list[tuple[dict[str, Any], Path, int]]:
    path = folder / "test.jsonl"
    rows = json_lines(path, name="math500")
    return [(row, path, line) for line, row in rows if _slug(field_of(row, "subject", path, line)) == subject]


def _of_folders(folder: Path, subject: str) -> list[tuple[dict[str, Any], Path, int]]:
    root = folder / "MATH" if (folder / "MATH").is_dir() else folder
    found: list[tuple[dict[str, Any], Path, int]] = []
    for path in sorted(
        (root / "test" / subject).glob("*.json"), key=lambda path: (len(path.stem), path.stem)
    ):
        try:
            row = json.loads(read_text(path, name="math"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"no JSON ({error}).", path=path) from None
        if not isinstance(row, dict):
            raise DataError("a JSON object with `problem` and `solution` was expected.", path=path)
        found.append((row, path, 1))
    return found


def _slug(subject: str) -> str:
    """Return the name of a subject as the archive's folders have it.

    >>> _slug("Counting & Probability")
    'counting_and_probability'
    """
    return subject.lower().replace("&", "and").replace(" ", "_")


def _has_json_lines(folder: Path) -> bool:
    """Say whether ``test.jsonl`` is of MATH: GSM8K's has the same name."""
    path = folder / "test.jsonl"
    if not path.is_file():
        return False
    try:
        first = next(json_lines(path, name="math500"), None)
    except DataError:
        return False
    return first is not None and {"problem", "solution", "subject"} <= first[1].keys()


def _has_folders(folder: Path) -> bool:
    roots = (folder, folder / "MATH")
    return any((root / "test" / subject).is_dir() for root in roots for subject in MATH_ROWS)


# ---- prompts ----


def zero_shot_cot(ask: Ask) -> PreparedProtocol:
    """Ask for reasoning and a boxed answer; a base model continues the form of the exemplars, without any."""

    def write(sample: Sample, num_fewshot: int) -> Prompt:
        del num_fewshot
        text = sample.question + INSTRUCTION if ask.is_chat else asked(sample)
        return text_prompt(text, num_fewshot=0, is_chat=ask.is_chat)

    return _prepared(write, RULES)


def few_shot_cot(ask: Ask) -> PreparedProtocol:
    """The four exemplars of Lewkowycz et al.; the answer is read as their models write it."""
    shots = [
        Exemplar(f"{LAYOUT[0]}{problem}{LAYOUT[1]}", f" {solution}")
        for problem, solution in exemplars(ask.folder)
    ]

    def write(sample: Sample, num_fewshot: int) -> Prompt:
        kept = shots[:num_fewshot]
        return text_prompt(as_text("", kept, asked(sample)), num_fewshot=len(kept), is_chat=ask.is_chat)

    few_shot = FewShot({subject: shots for subject in ask.subjects}, asked)
    return _prepared(write, {**RULES, "minerva": MINERVA}, few_shot)


def asked(sample: Sample) -> str:
    """Return a problem in the form of the exemplars."""
    return f"{LAYOUT[0]}{sample.question}{LAYOUT[1]}"


def _prepared(
    write: Callable[[Sample, int], Prompt], rules: Mapping[str, Rule], few_shot: FewShot | None = None
) -> PreparedProtocol:
    check_extra()  # before a model is asked for hours, whose answers nobody could compare
    return PreparedProtocol(
        kind=GENERATE,
        rules=rules,
        write=write,
        limits=Limits(COT_TOKENS, stop=math_answers.STOPS),
        num_fewshot=0 if few_shot is None else min(map(len, few_shot.exemplars.values())),
        few_shot=few_shot,
    )


def exemplars(folder: Path) -> list[tuple[str, str]]:
    """Read the exemplars of Lewkowycz et al. from JSON, or from lm-evaluation-harness's Python file.

    The Python file is parsed for its literals, never run.

    Raises:
        DataError: neither file is there, or it has other fields.
    """
    path = next((folder / name for name in EXEMPLAR_FILES if (folder / name).is_file()), None)
    if path is None:
        raise DataError(
            f"the worked exemplars are missing: neither {' nor '.join(EXEMPLAR_FILES)} is here."
            f" {WAY_OUT.format(name='math500')} Or ask without: `protocol=zero_shot_cot`.",
            path=folder,
        )
    text = read_text(path, name="math500")
    try:
        rows = json.loads(text) if path.suffix == ".json" else _literals(text)
        return [(_text(row["problem"]), _text(row["solution"])) for row in rows]
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise DataError(f"no list of `problem` and `solution` ({error}).", path=path) from None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a field is no text")
    return value


def _literals(text: str) -> list[dict[str, str]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples":
            returned = next((each.value for each in node.body if isinstance(each, ast.Return)), None)
            if returned is not None:
                return ast.literal_eval(returned)
    raise ValueError("no list_fewshot_samples is defined that returns them")


# ---- the two sets ----

MATH_ROWS = {
    "algebra": 1187,
    "counting_and_probability": 474,
    "geometry": 479,
    "intermediate_algebra": 903,
    "number_theory": 540,
    "prealgebra": 871,
    "precalculus": 546,
}
MATH500_ROWS = {
    "algebra": 124,
    "counting_and_probability": 38,
    "geometry": 41,
    "intermediate_algebra": 97,
    "number_theory": 62,
    "prealgebra": 82,
    "precalculus": 56,
}


def _benchmark(release: _Release, title: str, folder_names: tuple[str, ...]) -> Benchmark:
    return Benchmark(
        name=release.name,
        title=title,
        licence="MIT",
        splits=(SPLIT,),
        subjects=tuple(release.rows),
        protocols={"zero_shot_cot": zero_shot_cot, "few_shot_cot": few_shot_cot},
        chat_protocol="zero_shot_cot",
        base_protocol="few_shot_cot",
        groups=lambda split: Groups(headline=MICRO),
        is_here=release.is_here,
        load=lambda folder, split, subjects: _load(release, folder, split, subjects),
        folder_names=folder_names,
    )


MATH500 = _benchmark(
    _Release("math500", MATH500_ROWS, _of_json_lines, _has_json_lines), "MATH-500", ("math500", "MATH-500")
)
MATH = _benchmark(_Release("math", MATH_ROWS, _of_folders, _has_folders), "MATH", ("math", "MATH"))
