"""What the YAML file of a benchmark may hold; every mistake is told with its line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from evaluation.sample import ALPHABET
from glmtune.errors import DataError
from glmtune.storage.records import shown
from glmtune.storage.yaml_text import load_yaml, read_text

SUFFIXES = (".yaml", ".yml")
RULES = ("number", "letter", "first_line", "last_line", "whole")
SCORES = ("exact", "ignore_case", "number", "any_of", "rouge_l", "bleu", "f1")
GRADED = ("rouge_l", "bleu", "f1")
"""Scores that find an answer more or less right, from 0 to 1."""
NonEmpty = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Turn(_Part):
    """One message of a prompt: who says it, and the Jinja template of what."""

    role: Literal["system", "user", "assistant"]
    content: NonEmpty


class FewShotPart(_Part):
    """Worked examples before a question.

    Attributes:
        split: the file of ``files`` they are in; the first rows count, of a question's subject where its rows
            name one.
        number: how many.
        answer: Jinja template of an example's answer.
    """

    split: NonEmpty
    number: Annotated[int, Field(ge=1, le=64)] = 5
    answer: NonEmpty = "{{ answer }}"


class RuleTest(_Part):
    """What an answer would be, and what the rule must find in it (null: nothing)."""

    text: str
    finds: str | None


class ExtractPart(_Part):
    """How an answer is read: one of the named rules, or a regular expression whose first group is it.

    Attributes:
        rule: one of ``RULES``.
        pattern: the last match counts.
        tests: answers on which the rule is tried whenever the file is read.
    """

    rule: Literal["number", "letter", "first_line", "last_line", "whole"] | None = None
    pattern: NonEmpty | None = None
    tests: list[RuleTest] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_way(self) -> ExtractPart:
        if (self.rule is None) == (self.pattern is None):
            raise ValueError(f"needs `rule` (one of {', '.join(RULES)}) or `pattern`, and not both")
        return self


class Description(_Part):
    """A benchmark.

    Attributes:
        title: for readers.
        licence: of the questions.
        files: split → file (JSON lines, JSON, CSV, TSV, Parquet), beside this one, or ``hub:OWNER/NAME``
            with ``:SPLIT`` or ``:CONFIG:SPLIT`` behind it; the first split is asked.
        subject: column that names a question's subject.
        cluster: column that names what a question shares with others, such as a document; errors are shown
            with questions clustered by it.
        question: Jinja template of the question, over the columns of its row.
        options: columns with the options, or one column with a list of them.
        answer: column with the key, or a template of it: a text, a number, a list (``any_of`` and grades), or
            with options a letter, the place of the right one from 0, or its text.
        kind: ``generate``; ``choices`` compares the probabilities of the letters behind the prompt; ``both``
            lets the model write first and compares behind ``second_prompt``.
        prompt: Jinja template; beside the columns it has ``question``, ``options``, ``letters``, ``subject``.
        turns: messages instead of ``prompt``, for chat models.
        second_prompt: with ``both``: template with ``prompt`` and ``completion``.
        few_shot: worked examples.
        stop: texts that end an answer.
        max_new_tokens: an answer may have.
        extract: how it is read; with options the letter, else the whole answer, if left out.
        score: how it is compared with the key; ``GRADED`` ones give a grade from 0 to 1.
        average: ``micro`` (every question weighs the same) or ``macro`` (every subject).
        groups: category → its subjects.
    """

    title: NonEmpty
    licence: NonEmpty = "not named"
    files: Annotated[dict[NonEmpty, NonEmpty], Field(min_length=1)]
    subject: NonEmpty | None = None
    cluster: NonEmpty | None = None
    question: NonEmpty = "{{ question }}"
    options: Annotated[list[NonEmpty], Field(min_length=2, max_length=len(ALPHABET))] | NonEmpty | None = None
    answer: NonEmpty = "answer"
    kind: Literal["generate", "choices", "both"] = "generate"
    prompt: NonEmpty | None = None
    turns: Annotated[list[Turn], Field(min_length=1)] | None = None
    second_prompt: NonEmpty | None = None
    few_shot: FewShotPart | None = None
    stop: list[NonEmpty] = Field(default_factory=list)
    max_new_tokens: Annotated[int, Field(ge=1, le=65536)] = 256
    extract: ExtractPart | None = None
    score: Literal["exact", "ignore_case", "number", "any_of", "rouge_l", "bleu", "f1"] = "exact"
    average: Literal["micro", "macro"] = "micro"
    groups: dict[NonEmpty, list[NonEmpty]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _belong_together(self) -> Description:
        if (self.prompt is None) == (self.turns is None):
            raise ValueError("needs `prompt` or `turns`, and not both")
        if self.turns is not None and self.turns[-1].role != "user":
            raise ValueError("the last of `turns` must be the user's, which the model answers")
        if self.turns is not None and self.few_shot is not None:
            raise ValueError(
                "`few_shot` needs `prompt`, whose form the examples take; write them into `turns`"
            )
        if self.kind != "generate" and self.options is None:
            raise ValueError(f"`kind: {self.kind}` compares letters, so it needs `options`")
        if (self.kind == "both") != (self.second_prompt is not None):
            raise ValueError("`kind: both` and `second_prompt` belong together")
        if self.kind == "choices" and self.model_fields_set & {"stop", "extract", "max_new_tokens"}:
            raise ValueError(
                "`kind: choices` generates nothing, so it has no `stop`, `extract` or `max_new_tokens`"
            )
        if self.kind == "both" and self.prompt is None:
            raise ValueError("`kind: both` needs `prompt`, which `second_prompt` goes on from")
        if self.few_shot is not None and self.few_shot.split not in self.files:
            raise ValueError(
                f"`few_shot.split` is `{self.few_shot.split}`, but `files` has {', '.join(self.files)}"
            )
        # With options a key becomes its letter, whatever the file has: no other score could ever be right.
        if self.options is not None and self.score != "exact":
            raise ValueError(
                f"`options` make every key a letter, which `score: exact` compares, not {self.score}"
            )
        return self


def is_description(name: str) -> bool:
    """Say whether a benchmark is named by a file of this form."""
    return name.lower().endswith(SUFFIXES)


def read_description(path: Path) -> tuple[Description, dict[str, int]]:
    """Read the file of a benchmark.

    Args:
        path: UTF-8 YAML.

    Returns:
        What it says, and the line, from 1, of each of its keys; of one that is left out 1.

    Raises:
        DataError: it is absent, no YAML, or holds what it may not; the line is named.
    """
    try:
        text = read_text(path)
        values = load_yaml(text)
    except FileNotFoundError:
        raise DataError(
            "there is no such file of a benchmark. See docs/own_benchmarks.md.", path=path
        ) from None
    except OSError as error:
        raise DataError(f"it cannot be read ({error.strerror or error}).", path=path) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error)
        line = None if mark is None else mark.line + 1
        raise DataError(
            f"no YAML: {what}. Quote texts with `: ` or `{{` in them.", path=path, line=line
        ) from None
    if not isinstance(values, dict):
        raise DataError(f"keys were expected ({', '.join(Description.model_fields)}).", path=path, line=1)
    try:
        found = Description.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise DataError(_worded(problem), path=path, line=line_of(text, problem["loc"])) from None
    return found, {name: line_of(text, [name]) for name in Description.model_fields}


def _worded(found: Any) -> str:
    # pydantic also names the types and validators that it went through, which no file has.
    place = [
        str(part) for part in found["loc"] if not str(part).startswith(("constrained", "list[", "function"))
    ]
    name = ".".join(place) or "the file"
    if found["type"] == "extra_forbidden":
        known = _fields(found["loc"][:-1])
        near = difflib.get_close_matches(place[-1], known, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        return f"`{name}` is no key here; there are {', '.join(known)}.{hint}"
    if found["type"] == "missing":
        return f"`{name}` is missing."
    message = str(found["msg"]).removeprefix("Value error, ")
    if found["type"] == "value_error":
        return f"{message[:1].upper()}{message[1:]}."
    return f"`{name}` is {shown(found['input'])}: {message[:1].lower()}{message[1:]}."


def _fields(place: Sequence[Any]) -> list[str]:
    part: Any = Description
    parts = {"few_shot": FewShotPart, "extract": ExtractPart, "turns": Turn, "tests": RuleTest}
    for name in place:
        part = parts.get(str(name), part)
    return list(part.model_fields)


def line_of(text: str, place: Sequence[Any]) -> int:
    """Return the line, from 1, in which a value of a YAML text begins.

    Args:
        text: read before, so that it is known to be YAML within bounds.
        place: keys and places from the outside in; the nearest that is there counts.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    line = 0
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == part]
            if not found:
                break
            line, node = found[0][0].start_mark.line, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
    return line + 1
