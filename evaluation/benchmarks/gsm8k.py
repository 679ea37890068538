"""GSM8K: word problems (Cobbe et al. 2021, arXiv:2110.14168), in English and in two Chinese translations.

Data as in openai/grade-school-math @ 3101c7d; the eight exemplars of Wei et al. 2022 (arXiv:2201.11903, table
20) from a file; Chinese exemplars and 250 problems from MGSM (Shi et al. 2022, arXiv:2210.03057), all 1,319
problems machine-translated in Yuan 2.0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from evaluation.backend import Limits
from evaluation.benchmarks.benchmark import (
    Ask,
    Benchmark,
    check_rows,
    expected_rows,
    field_of,
    json_lines,
    read_text,
    sample_set_rows,
)
from evaluation.benchmarks.gsm8k_exemplars import ANSWER_ZH, QUESTION_ZH, mgsm_exemplars, wei_exemplars
from evaluation.extraction import numbers as number_rules
from evaluation.fewshot import Exemplar, FewShot, as_text, text_prompt
from evaluation.metrics import MICRO, Groups
from evaluation.sample import Prompt, Sample
from evaluation.task import GENERATE, PreparedProtocol, Rule
from glmtune.errors import DataError

SPLIT = "test"
ROWS = {"gsm8k": {"test": 1319, "train": 7473}, "gsm8k_zh": {"test": 1319}, "mgsm_zh": {"test": 250}}
COT_TOKENS = 512
"""Chat models are verbose: 256, which other harnesses use, cuts off answers before their number."""
STEPS = " Let's think step by step."  # Kojima et al. 2022, arXiv:2205.11916
_MARKS = re.compile(r"<<[^<>]*>>")
_GOLD = re.compile(r"#### (-?[0-9.,]+)\s*$")
_FOLDERS = {
    "gsm8k": ("", "grade_school_math/data"),
    "gsm8k_zh": ("",),
    "mgsm_zh": ("", "mgsm", "gsm8k_zh"),
}
# The first rule decides. It is not the official one: that reads `#### N`, which only models trained on GSM8K
# write.
RULES = {
    "decimal": Rule(
        "number after the last marker, else the last number; as decimals",
        number_rules.decimal,
        number_rules.is_the_same_number,
        version=2,
    ),
    "official": Rule("number after `####`, as text", number_rules.official, number_rules.is_the_same_text),
    "strict": Rule(
        "number of `The answer is N`, as decimals",
        number_rules.strict,
        number_rules.is_the_same_number,
        version=2,
    ),
    "flexible": Rule(
        "last number, as decimals", number_rules.flexible, number_rules.is_the_same_number, version=2
    ),
}


def gold(answer: str, path: Path, line: int) -> str:
    """Return the number after ``#### `` of an official answer, its thousands commas removed.

    Raises:
        DataError: there is none.
    """
    found = _GOLD.search(answer)
    if found is None:
        raise DataError(
            f"the answer has no `#### number` at its end: {answer[-40:]!r}.", path=path, line=line
        )
    return found.group(1).replace(",", "")


def without_marks(answer: str) -> str:
    """Return an answer without calculator marks, which models imitate.

    >>> without_marks("2*3=<<2*3=6>>6 eggs")
    '2*3=6 eggs'
    """
    return _MARKS.sub("", answer)


def load_json_lines(folder: Path, split: str, subjects: Sequence[str], *, name: str) -> list[Sample]:
    """Read ``SPLIT.jsonl`` with ``question`` and ``answer`` (the translation numbers its rows in ``id``).

    Raises:
        DataError: the file is missing or malformed, or the number of rows is not the official one.
    """
    del subjects
    own = sample_set_rows(folder, split)
    path = _inside(folder, name, f"{split}.jsonl")
    samples = []
    for index, (line, row) in enumerate(json_lines(path, name=name)):
        question, answer = (field_of(row, key, path, line) for key in ("question", "answer"))
        if name == "gsm8k_zh" and row.get("id") != index:
            raise DataError(
                f"`id` is {row.get('id')!r}, but rows of the translation carry the number of their English"
                f" row (here {index}). English files belong to `benchmark=gsm8k`.",
                path=path,
                line=line,
            )
        samples.append(
            Sample(
                benchmark=name,
                subject=name,
                index=index,
                question=question,
                answer=gold(answer, path, line),
                row_id=str(index),
                explanation=without_marks(answer[: answer.rfind("####")].strip()),
            )
        )
    check_rows(path, len(samples), expected_rows(own, name, ROWS[name][split]), name=name)
    return samples


def load_mgsm(folder: Path, split: str, subjects: Sequence[str]) -> list[Sample]:
    """Read ``mgsm_zh.tsv``: question, tab, number.

    Raises:
        DataError: the file is missing or malformed, or the number of rows is not the official one.
    """
    del subjects
    name = "mgsm_zh"
    own = sample_set_rows(folder, split)
    path = _inside(folder, name, "mgsm_zh.tsv")
    samples = []
    for index, line in enumerate(read_text(path, name=name).rstrip("\n").split("\n")):
        question, tab, number = line.rstrip("\r").rpartition("\t")
        if not tab:
            raise DataError("a question, a tab and a number were expected.", path=path, line=index + 1)
        answer = gold(f"#### {number}", path, index + 1)
        samples.append(Sample(name, name, index, question, answer=answer, row_id=str(index)))
    check_rows(path, len(samples), expected_rows(own, name, ROWS[name][split]), name=name)
    return samples


def _inside(folder: Path, name: str, file: str) -> Path:
    paths = [folder / inner / file for inner in _FOLDERS[name]]
    return next((path for path in paths if path.is_file()), paths[0])


@dataclass(frozen=True, slots=True)
class _Layout:
    """What stands before a question, before a given answer, and before the answer of the model."""

    question: str
    answer: str
    cue: str


def _cot(
    layout: _Layout, exemplars: Callable[[Path], list[tuple[str, str]]]
) -> Callable[[Ask], PreparedProtocol]:
    def few_shot_cot(ask: Ask) -> PreparedProtocol:
        shots = [
            Exemplar(f"{layout.question}{question}{layout.answer}", answer)
            for question, answer in exemplars(ask.folder)
        ]

        def write(sample: Sample, num_fewshot: int) -> Prompt:
            kept = shots[:num_fewshot]
            text = as_text("", kept, f"{layout.question}{sample.question}{layout.cue}")
            return text_prompt(text, num_fewshot=len(kept), is_chat=ask.is_chat)

        def ask_as_exemplars(sample: Sample) -> str:
            return f"{layout.question}{sample.question}{layout.answer}"

        return _prepared(write, few_shot=FewShot({name: shots for name in ask.subjects}, ask_as_exemplars))

    return few_shot_cot


def _zero_shot_cot(layout: _Layout, steps: str) -> Callable[[Ask], PreparedProtocol]:
    def zero_shot_cot(ask: Ask) -> PreparedProtocol:
        def write(sample: Sample, num_fewshot: int) -> Prompt:
            del num_fewshot
            if ask.is_chat:
                return text_prompt(sample.question, num_fewshot=0, is_chat=True)
            text = f"{layout.question}{sample.question}{layout.cue}{steps}"
            return text_prompt(text, num_fewshot=0, is_chat=False)

        return _prepared(write)

    return zero_shot_cot


def _prepared(write: Callable[[Sample, int], Prompt], few_shot: FewShot | None = None) -> PreparedProtocol:
    num_fewshot = 0 if few_shot is None else min(map(len, few_shot.exemplars.values()))
    return PreparedProtocol(
        kind=GENERATE,
        rules=RULES,
        write=write,
        limits=Limits(COT_TOKENS, stop=number_rules.STOPS),
        num_fewshot=num_fewshot,
        few_shot=few_shot,
    )


def _benchmark(
    name: str,
    title: str,
    licence: str,
    protocols: dict[str, Callable[[Ask], PreparedProtocol]],
    load: Callable[[Path, str, Sequence[str]], list[Sample]],
    file: str,
) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        licence=licence,
        splits=tuple(ROWS[name]),
        subjects=(name,),
        protocols=protocols,
        chat_protocol="few_shot_cot",
        base_protocol="few_shot_cot",
        groups=lambda split: Groups(headline=MICRO),
        is_here=lambda folder: _inside(folder, name, file).is_file(),
        load=load,
        folder_names=(name, "gsm8k_zh", "mgsm") if name == "mgsm_zh" else (name,),
    )


_EN = _Layout("Q: ", "\nA: ", "\nA:")
_ZH = _Layout(QUESTION_ZH, f"\n{ANSWER_ZH}", f"\n{ANSWER_ZH}")
EN_PROTOCOLS = {"few_shot_cot": _cot(_EN, wei_exemplars), "zero_shot_cot": _zero_shot_cot(_EN, STEPS)}
_ZH_PROTOCOLS = {"few_shot_cot": _cot(_ZH, mgsm_exemplars), "zero_shot_cot": _zero_shot_cot(_ZH, "")}

GSM8K = _benchmark(
    "gsm8k",
    "GSM8K",
    "MIT",
    EN_PROTOCOLS,
    partial(load_json_lines, name="gsm8k"),
    "test.jsonl",
)
GSM8K_ZH = _benchmark(
    "gsm8k_zh",
    "GSM8K, Chinese by machine",
    "Apache-2.0 (translation), MIT (GSM8K)",
    _ZH_PROTOCOLS,
    partial(load_json_lines, name="gsm8k_zh"),
    "test.jsonl",
)
MGSM_ZH = _benchmark("mgsm_zh", "MGSM, Chinese", "CC BY 4.0", _ZH_PROTOCOLS, load_mgsm, "mgsm_zh.tsv")
