"""The general prompts that ship: enough of every kind, and what is replayed is neither measured nor examined."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.tasks import make_task
from glmtune.data.reading.shipped import resolve_shipped
from glmtune.tiny.exam import exam

NUM_PROMPTS = {"retain": 643, "retention": 200}
CATEGORIES = {"chat", "facts", "arithmetic", "instructions", "code", "refusal"}


def rows(name: str) -> list[dict[str, Any]]:
    lines = resolve_shipped(f"{name}/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def bare(*texts: str) -> str:
    """Texts as they count when told apart: letters, digits and signs without width, case and punctuation."""
    text = unicodedata.normalize("NFKC", " ".join(texts)).casefold()
    return "".join(c for c in text if unicodedata.category(c)[0] in "LNS")


def asked(name: str) -> list[str]:
    if name == "exam":
        samples = make_task("exam", data_dir="sample").samples
        return [bare(*(turn.content for turn in s.history), s.question, *s.choices) for s in samples]
    earlier = ([text for pair in row.get("history", []) for text in pair] for row in rows(name))
    return [bare(*before, row["prompt"]) for before, row in zip(earlier, rows(name), strict=True)]


@pytest.mark.parametrize("name", NUM_PROMPTS)
def test_prompts_of_every_kind(name: str) -> None:
    found = rows(name)
    assert len(found) == NUM_PROMPTS[name]
    assert {row["category"] for row in found} == CATEGORIES
    for category, number in Counter(row["category"] for row in found).items():
        assert number >= 0.05 * len(found), category
    languages = Counter(row["language"] for row in found)
    assert set(languages) == {"zh", "en"}
    assert min(languages.values()) > 0.45 * len(found)
    for category in CATEGORIES:
        both = {row["language"] for row in found if row["category"] == category}
        assert both == {"zh", "en"}, category
    assert sum("history" in row for row in found) >= 0.05 * len(found)
    for row in found:
        assert set(row) <= {"prompt", "history", "category", "language"}
        assert row["prompt"].strip() == row["prompt"] != ""
        assert all(len(pair) == 2 and all(pair) for pair in row.get("history", []))


def test_both_sets_have_the_same_shares() -> None:
    shares = []
    for name, number in NUM_PROMPTS.items():
        counts = Counter(row["category"] for row in rows(name))
        shares.append({category: counts[category] / number for category in CATEGORIES})
    assert all(abs(shares[0][category] - shares[1][category]) < 0.03 for category in CATEGORIES)


@pytest.mark.parametrize("name", ["retain", "retention", "exam"])
def test_nothing_is_asked_twice(name: str) -> None:
    twice = [text for text, number in Counter(asked(name)).items() if number > 1]
    assert not twice


def test_no_prompt_stands_in_two_sets() -> None:
    sets = {name: set(asked(name)) for name in ("retain", "retention", "exam")}
    # What glm-tiny is examined in while it is made would tell of its corpus, not of what tuning keeps.
    sets["glm-tiny's exam"] = {
        bare(*(message.content for message in sample.messages[:-1])) for sample in exam(100, seed=0)
    }
    for one, other in combinations(sets, 2):
        assert not sets[one] & sets[other], (one, other)


@pytest.mark.parametrize("name", ["ceval", "mmlu", "gsm8k", "gsm8k_zh", "bbh"])
def test_no_question_of_a_benchmark(name: str, benchmarks_data: Path) -> None:
    real = {bare(sample.question) for sample in make_task(name, data_dir=benchmarks_data).samples}
    ours = {bare(row["prompt"]) for kind in NUM_PROMPTS for row in rows(kind)}
    ours |= {bare(sample.question) for sample in make_task("exam", data_dir="sample").samples}
    assert not real & ours
