"""`resume=force` and `init_from` in every way of dividing weights: all equal one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import slow_except
from tests.e2e.stories import Story, run_sessions

COMMON = [
    *(
        "+recipe=full",
        "retention=null",
        "data=files",
        "data.layout=adgen",
        "data.max_train_samples=37",
        "trainer.max_steps=2",
    ),
    *(
        "trainer.learning_rate=1e-3",
        "trainer.lr_scheduler_type=constant",
        "trainer.gradient_accumulation_steps=2",
    ),
    *("trainer.logging_steps=1", "trainer.save_steps=2", "trainer.report_to=[]"),
]
OTHERS = [
    *(
        "trainer.max_steps=5",
        "trainer.learning_rate=4e-3",
        "trainer.weight_decay=0.5",
        "trainer.adam_beta1=0.5",
    ),
    *(
        "trainer.adam_beta2=0.9",
        "trainer.adam_epsilon=1e-4",
        "trainer.lr_scheduler_type=linear",
        "resume=force",
    ),
]
WAYS = {
    "fsdp": ["distributed=fsdp"],
    "zero2": ["deepspeed=zero2"],
    "zero3": ["deepspeed=zero3"],
}
SOME = ("fsdp", "zero2")
BEGINNING = ("one", "fsdp", "zero3")
"""Ways in which a new run begins with the weights of an earlier one: whole, and read shard by shard."""


@pytest.fixture(scope="module")
def story(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, slow_too: bool
) -> Story:
    pytest.importorskip("deepspeed")
    files = [f"data.{name}_file={tiny_rows[name]}" for name in ("train", "validation")]
    plan = []
    for name, words in {"one": [], **{way: WAYS[way] for way in (WAYS if slow_too else SOME)}}.items():
        count, rows = (1, 4) if name == "one" else (2, 2)
        common = [*COMMON, *files, f"model.source={tiny_base}", f"output_dir={name}", *words]
        common.append(f"trainer.per_device_train_batch_size={rows}")
        plan.append({"name": f"{name}-first", "count": count, "overrides": common})
        plan.append({"name": f"{name}-forced", "count": count, "overrides": [*common, *OTHERS]})
    for way in BEGINNING if slow_too else BEGINNING[:2]:
        count, rows = (1, 4) if way == "one" else (2, 2)
        words = [*COMMON, *files, f"model.source={tiny_base}", f"output_dir={way}-new", *WAYS.get(way, [])]
        words += [f"trainer.per_device_train_batch_size={rows}", "init_from=one/checkpoint-2"]
        plan.append({"name": f"{way}-new", "count": count, "overrides": words})
    return run_sessions(tmp_path_factory.mktemp("forced"), plan)


@pytest.mark.parametrize("way", slow_except(SOME, WAYS))
def test_what_is_recorded_is_what_runs(way: str, story: Story) -> None:
    for name in (f"{way}-first", f"{way}-forced", "one-forced"):
        assert set(story.codes(name)) == {0}, story.said(name, 0)[-3000:]
    assert "`trainer.adam_beta1`: 0.9 then, 0.5 now" in story.said(f"{way}-forced", 0)
    rates = story.logged(way, "learning_rate")
    assert rates == pytest.approx([1e-3, 1e-3, 4e-3 * 3 / 5, 4e-3 * 2 / 5, 4e-3 * 1 / 5])
    assert story.losses(way) == pytest.approx(story.losses("one"), rel=5e-5)
    mine, theirs = story.weights(way), story.weights("one")
    assert mine.keys() == theirs.keys() != set()
    for name, weight in mine.items():
        assert (weight - theirs[name]).abs().max() < 3e-4, name


@pytest.mark.parametrize("way", slow_except(("fsdp",), BEGINNING[1:]))
def test_a_new_run_begins_with_earlier_weights(way: str, story: Story) -> None:
    for name in ("one-new", f"{way}-new"):
        assert set(story.codes(name)) == {0}, story.said(name, 0)[-3000:]
        assert "beginning with the weights in" in story.said(name, 0)
    assert story.losses(f"{way}-new") == pytest.approx(story.losses("one-new"), rel=5e-5)
    assert story.evaluations(f"{way}-new")[0] == pytest.approx(story.evaluations("one")[1], rel=1e-5)
    started = [
        json.loads((story.folder / f"{name}-new" / "last" / "checkpoint.json").read_text())["started_from"]
        for name in ("one", way)
    ]
    assert started[0] == started[1]
