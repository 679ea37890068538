"""The worked exemplars of GSM8K prompts, read from the files that publish them."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.benchmarks.benchmark import WAY_OUT, read_text
from glmtune.errors import DataError
from glmtune.storage.records import shown

WEI_FILES = ("cot_prompt_wei2022_8shot.json", "cot_prompt_8shot.json", "gsm8k-cot.yaml")
MGSM_FILES = ("mgsm_exemplars_en_zh.json", "exemplars.py")
QUESTION_ZH = "问题："
ANSWER_ZH = "逐步解答："


def wei_exemplars(folder: Path) -> list[tuple[str, str]]:
    """Read the eight questions and answers of Wei et al. from JSON, or from lm-evaluation-harness's YAML.

    Raises:
        DataError: neither file is there, or it has other fields.
    """
    path = _exemplar_file(folder, WEI_FILES, name="gsm8k")
    text = read_text(path, name="gsm8k")
    try:
        rows = json.loads(text) if path.suffix == ".json" else _yaml_samples(text)
        return [(_text(row["question"]), _text(row["target"])) for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"no list of `question` and `target` ({error}).", path=path) from None


def _yaml_samples(text: str) -> list[dict[str, str]]:
    import yaml

    from glmtune.storage.yaml_text import load_yaml

    try:
        return load_yaml(text)["fewshot_config"]["samples"]
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def mgsm_exemplars(folder: Path) -> list[tuple[str, str]]:
    """Read the eight Chinese questions and answers of MGSM from JSON, or from its ``exemplars.py``.

    The Python file is parsed for its literals, never run. The labels stay out (they are the layout's).

    Raises:
        DataError: neither file is there, or it has other fields.
    """
    path = _exemplar_file(folder, MGSM_FILES, name="gsm8k_zh")
    text = read_text(path, name="gsm8k_zh")
    try:
        rows: dict[str, Any] = (json.loads(text) if path.suffix == ".json" else _literals(text))["zh"]
        pairs = [(_text(rows[key]["q"]), _text(rows[key]["a"])) for key in sorted(rows, key=int)]
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise DataError(f"no Chinese exemplars with `q` and `a` ({error}).", path=path) from None
    return [
        (question.removeprefix(QUESTION_ZH), answer.removeprefix(ANSWER_ZH)) for question, answer in pairs
    ]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shown(value)} is no text")
    return value


def _literals(text: str) -> dict[str, Any]:
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "MGSM_EXEMPLARS" for target in node.targets
        ):
            return ast.literal_eval(node.value)
    raise ValueError("MGSM_EXEMPLARS is not assigned")


def _exemplar_file(folder: Path, names: Sequence[str], *, name: str) -> Path:
    places = [place / file for place in (folder, folder / "mgsm") for file in names]
    for path in places:
        if path.is_file():
            return path
    raise DataError(
        f"the worked exemplars are missing: neither {' nor '.join(names)} is here."
        f" {WAY_OUT.format(name=name)}",
        path=folder,
    )
