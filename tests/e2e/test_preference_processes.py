"""Preference tuning in two real processes equals one, whoever divides the weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import slow_except
from tests.e2e.stories import Story, run_sessions

PREFIX, KTO, LORA, FULL = "+recipe=dpo", "+recipe=kto", "+recipe=lora", "+recipe=full"
# 21 pairs, 8 in a step: the last step of an epoch has 5, and so a filler in its last micro-batch.
COMMON = [
    *("data=preference", "retention=null", "resume=force", "seed=3", "trainer.learning_rate=1e-3"),
    *("trainer.max_steps=4", "trainer.gradient_accumulation_steps=2", "trainer.logging_steps=1"),
    *(
        "trainer.eval_steps=2",
        "trainer.save_steps=2",
        "trainer.report_to=[]",
        "trainer.group_by_length=false",
    ),
]
SMALL = ["prefix.pre_seq_len=4", "prefix.dropout=0"]
DPO = ["preference=dpo", "preference.sft_weight=0.5"]
ONE, TWO = "trainer.per_device_train_batch_size=4", "trainer.per_device_train_batch_size=2"
HAS_ZERO = importlib.util.find_spec("deepspeed") is not None
CELLS = [("prefix", "prefix-one"), ("full-zero3", "full-one"), ("kto", "kto-one"), ("full-fsdp", "full-one")]
CELLS = [cell for cell in [*CELLS, ("lora-zero2", "lora-one")] if HAS_ZERO or "zero" not in cell[0]]
FAST = CELLS[: 1 + HAS_ZERO]


@pytest.fixture(scope="module")
def story(tiny_base: Path, slow_too: bool, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("pairs")
    files = []
    for split, count in (("train", 21), ("validation", 7)):
        rows = [
            {
                "prompt": f"{place}?",
                "chosen": f"yes {place}" + "." * (place % 4),
                "rejected": "no " * (1 + place % 3),
            }
            for place in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(f"data.{split}_file={folder / split}.jsonl")
    words = {
        "prefix": [PREFIX, *SMALL, "preference.sft_weight=0.5"],
        "kto": [KTO, *SMALL],
        "lora": [LORA, *DPO, "lora.dropout=0"],
        "full": [FULL, *DPO],
    }
    plan: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for cell in (CELLS if slow_too else FAST) for name in cell):
        kind, _, divided = name.partition("-")
        more = {"fsdp": ["distributed=fsdp"], "": [], "one": []}.get(divided, [f"deepspeed={divided}"])
        count = 1 if divided == "one" else 2
        recipe, *own = words[kind]
        shared = [*COMMON, *files, f"model.source={tiny_base}", ONE if count == 1 else TWO]
        overrides = [recipe, *shared, *own, *more, f"output_dir={name}"]
        plan.append({"name": name, "overrides": overrides, "count": count})
    return run_sessions(tmp_path_factory.mktemp("preference"), plan)


def logged(story: Story, run: str, kind: str) -> list[float]:
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
    names = (
        ("loss", *names) if kind == "loss" else ("eval_loss", "eval_nll", *(f"eval_{name}" for name in names))
    )
    found = [entry for entry in story.log(run) if kind in entry]
    assert found
    return [entry[name] for entry in found for name in names]


@pytest.mark.parametrize(("run", "other"), slow_except(FAST, CELLS))
def test_two_processes_equal_one(story: Story, run: str, other: str) -> None:
    for name, count in ((run, 2), (other, 1)):
        said = [story.said(name, rank)[-3000:] for rank in range(count)]
        assert set(story.codes(name)) == {0}, "\n".join(said)
    for kind in ("loss", "eval_loss"):
        found, expected = (logged(story, name, kind) for name in (run, other))
        assert found == pytest.approx(expected, rel=2e-4, abs=1e-4), kind
    mine, theirs = story.weights(run), story.weights(other)
    assert mine.keys() == theirs.keys() != set()
    for name, weight in mine.items():
        assert (weight - theirs[name]).abs().max() < 3e-4, name
