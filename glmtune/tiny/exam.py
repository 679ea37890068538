"""The exam of glm-tiny: rows the corpus never trained on, answered greedily and scored skill by skill."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from random import Random

from glmtune.tiny.corpus.mix import MIX
from glmtune.tiny.corpus.sample import LETTERS, Sample

EXAM_SALT = "exam"
CHAT_SKILLS = ("chat", "ads", "arithmetic", "facts", "choice", "reasoning", "strings")
NUMBER = re.compile(r"-?\d+")

Answer = Callable[[Sequence[Sample]], Sequence[str]]


@dataclass(frozen=True, slots=True)
class SkillScore:
    """How one group of exam rows went.

    Attributes:
        group: the skill, or a part of it such as ``arithmetic, 3 digits``.
        num_samples: rows.
        accuracy: share of rows whose key was found, from 0 to 1.
    """

    group: str
    num_samples: int
    accuracy: float


def exam(per_skill: int = 100, *, seed: int = 0) -> list[Sample]:
    """Draw the exam's chat rows.

    Args:
        per_skill: rows of each skill.
        seed: another seed gives another exam.

    Returns:
        Conversations, skill by skill.
    """
    rows = []
    for skill in CHAT_SKILLS:
        make = MIX[skill][0]
        drawn = (make(Random(f"{EXAM_SALT}:{seed}:{skill}:{index}")) for index in count())
        rows += islice((sample for sample in drawn if sample.messages), per_skill)
    return rows


def is_right(sample: Sample, answer: str) -> bool:
    """Say whether an answer holds the sample's key, by the rule of its skill.

    Numbers must be the last number, letters the last option letter; a chat answer must be the expected
    sentence; an advertisement must mention every attribute value and end with a full stop.

    >>> from glmtune.tiny.corpus.sample import chat
    >>> is_right(chat("arithmetic", "3+4=?", "", key="7"), "3+4=7，答案是 7。")
    True
    """
    answer = answer.strip()
    if sample.skill == "arithmetic":
        return NUMBER.findall(answer)[-1:] == [sample.key]
    if sample.skill == "ads":
        return answer.endswith("。") and all(value in answer for value in sample.key.split("|"))
    if sample.skill == "choice" and sample.key in LETTERS:
        return re.findall(r"(?<![A-Za-z])[A-D](?![A-Za-z])", answer)[-1:] == [sample.key]
    if sample.skill in ("chat", "strings", "choice"):
        return answer == sample.messages[-1].content.strip()
    if sample.skill == "reasoning":
        return answer.rstrip("。.").endswith(sample.key) or answer == sample.messages[-1].content.strip()
    return sample.key in answer


def _group(sample: Sample) -> list[str]:
    if sample.skill == "arithmetic":
        numbers = NUMBER.findall(sample.messages[-2].content)
        return ["arithmetic", f"arithmetic, {max(len(number.lstrip('-')) for number in numbers)} digits"]
    if sample.skill == "choice":
        kind = "letter at once" if len(sample.messages[-1].content) == 1 else "with a reason"
        return ["choice", f"choice, {kind}"]
    return [sample.skill]


def score(samples: Sequence[Sample], answers: Sequence[str]) -> list[SkillScore]:
    """Score answers, by skill and by parts of a skill.

    Args:
        samples: from `exam`.
        answers: the model's, in the same order.

    Returns:
        One score per group, in alphabetical order.
    """
    hits: dict[str, list[bool]] = {}
    for sample, answer in zip(samples, answers, strict=True):
        for group in _group(sample):
            hits.setdefault(group, []).append(is_right(sample, answer))
    return [
        SkillScore(group, len(values), sum(values) / len(values)) for group, values in sorted(hits.items())
    ]


def coverage(samples: Sequence[Sample], answers: Sequence[str]) -> float:
    """Return the share of attribute values that advertisements mention, 0 where there are none."""
    found = [
        value in answer
        for sample, answer in zip(samples, answers, strict=True)
        if sample.skill == "ads"
        for value in sample.key.split("|")
    ]
    return sum(found) / len(found) if found else 0.0


def take(answer: Answer, *, per_skill: int = 100, seed: int = 0) -> tuple[list[SkillScore], float]:
    """Sit the exam.

    Args:
        answer: answers conversations, their last message left out, greedily.
        per_skill: rows of each skill.
        seed: of the exam.

    Returns:
        The scores, and the share of attribute values mentioned in advertisements.
    """
    samples = exam(per_skill, seed=seed)
    answers = list(answer(samples))
    return score(samples, answers), coverage(samples, answers)
