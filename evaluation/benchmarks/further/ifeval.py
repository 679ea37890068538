"""IFEval: 541 prompts with instructions that a program can check (Zhou et al. 2023, arXiv:2311.07911).

Data as in google-research @ 1963839, ``instruction_following_eval``; every instruction of a prompt counts,
strictly as the answer stands, and loosely with first and last line or asterisks left out. Published figures
are of four kinds: of prompts (all instructions followed) and of instructions, strict and loose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluation.backend import Limits
from evaluation.benchmarks.benchmark import (
    Ask,
    Benchmark,
    check_rows,
    expected_rows,
    field_of,
    json_lines,
    sample_set_rows,
)
from evaluation.benchmarks.further import instructions
from evaluation.fewshot import text_prompt
from evaluation.metrics import MICRO, Groups
from evaluation.sample import Prompt, Sample
from evaluation.task import GENERATE, PreparedProtocol, Rule
from glmtune.errors import DataError
from glmtune.storage.records import shown

NAME = "ifeval"
SPLIT = "test"
ROWS = 541
FILES = ("input_data.jsonl", "ifeval_input_data.jsonl")
MAX_NEW_TOKENS = 1280
"""As lm-evaluation-harness: prompts ask for up to 1,000 words."""
FOLLOWED, BROKEN = "yes", "no"
BETWEEN = "; "


def load(folder: Path, split: str, subjects: Sequence[str]) -> list[Sample]:
    """Read the prompts; their instructions, as JSON, are what answers are held to.

    Args:
        folder: holds ``input_data.jsonl`` (on the hub ``ifeval_input_data.jsonl``).
        split: ``test``, the only one.
        subjects: ``ifeval``, the only one.

    Raises:
        DataError: the file is missing, a row is malformed or has an instruction that is not known, or the
            number of rows is not the official one.
    """
    del subjects
    own = sample_set_rows(folder, split)
    path = _file(folder)
    samples = [
        _sample(row, index, path, line) for index, (line, row) in enumerate(json_lines(path, name=NAME))
    ]
    check_rows(path, len(samples), expected_rows(own, NAME, ROWS), name=NAME)
    return samples


def _sample(row: dict[str, Any], index: int, path: Path, line: int) -> Sample:
    names, given = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not isinstance(given, list) or len(names) != len(given) or not names:
        raise DataError(
            f"`instruction_id_list` is {shown(names)} and `kwargs` {shown(given)}, but they must be lists of"
            " the same length, at least 1.",
            path=path,
            line=line,
        )
    if not all(isinstance(name, str) for name in names) or not all(
        kwargs is None or isinstance(kwargs, dict) for kwargs in given
    ):
        raise DataError(
            f"`instruction_id_list` is {shown(names)} and `kwargs` {shown(given)}, but they must hold texts"
            " and objects.",
            path=path,
            line=line,
        )
    # The hub's copy has every argument of every kind, those that do not apply as null.
    asked = [
        {"id": name, **{key: value for key, value in (kwargs or {}).items() if value is not None}}
        for name, kwargs in zip(names, given, strict=True)
    ]
    try:
        instructions.check_known(asked)
    except ValueError as error:
        raise DataError(f"an instruction cannot be checked: {error}.", path=path, line=line) from None
    # The instructions are the gold answer: so they enter the hash of the data, and rules find them.
    return Sample(
        NAME,
        NAME,
        index,
        field_of(row, "prompt", path, line),
        answer=json.dumps(asked, ensure_ascii=False),
        row_id=str(row.get("key", index)),
    )


def _file(folder: Path) -> Path:
    places = [folder / inner / name for inner in ("", "data") for name in FILES]
    return next((path for path in places if path.is_file()), places[0])


# ---- rules ----


def _extract(is_loose: bool) -> Callable[[str, Sample], str | None]:
    def outcomes(text: str, sample: Sample) -> str | None:
        """Say of every instruction whether it is followed; nothing of an empty answer."""
        if not text.strip():
            return None
        asked = json.loads(sample.answer)
        followed = instructions.followed_loosely if is_loose else instructions.followed
        parts = (f"{each['id']}={FOLLOWED if followed(each, text) else BROKEN}" for each in asked)
        return BETWEEN.join(parts)

    return outcomes


def _all_followed(extracted: str, sample: Sample) -> bool:
    del sample
    return all(part.endswith(f"={FOLLOWED}") for part in extracted.split(BETWEEN))


def _share_followed(extracted: str, sample: Sample) -> float:
    del sample
    parts = extracted.split(BETWEEN)
    return sum(part.endswith(f"={FOLLOWED}") for part in parts) / len(parts)


def _num_instructions(sample: Sample) -> float:
    return float(len(json.loads(sample.answer)))


RULES = {
    "strict": Rule("prompts all of whose instructions are followed", _extract(False), _all_followed),
    "loose": Rule(
        "the same, first and last line or asterisks left out where that helps", _extract(True), _all_followed
    ),
    "instructions_strict": Rule(
        "instructions followed, of all", _extract(False), grade=_share_followed, weigh=_num_instructions
    ),
    "instructions_loose": Rule(
        "instructions followed loosely, of all",
        _extract(True),
        grade=_share_followed,
        weigh=_num_instructions,
    ),
}


def zero_shot(ask: Ask) -> PreparedProtocol:
    """Ask the prompt as it stands; a base model continues it as a text."""
    instructions.check_extra()

    def write(sample: Sample, num_fewshot: int) -> Prompt:
        del num_fewshot
        return text_prompt(sample.question, num_fewshot=0, is_chat=ask.is_chat)

    return PreparedProtocol(kind=GENERATE, rules=RULES, write=write, limits=Limits(MAX_NEW_TOKENS))


IFEVAL = Benchmark(
    name=NAME,
    title="IFEval",
    licence="Apache-2.0",
    splits=(SPLIT,),
    subjects=(NAME,),
    protocols={"zero_shot": zero_shot},
    chat_protocol="zero_shot",
    base_protocol="zero_shot",
    groups=lambda split: Groups(headline=MICRO),
    is_here=lambda folder: _file(folder).is_file(),
    load=load,
    folder_names=(NAME, "IFEval", "instruction_following_eval"),
)
