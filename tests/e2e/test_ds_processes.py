"""Two real processes under ZeRO: they equal one process, and survive what befalls one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import slow_except
from tests.e2e.stories import SECONDS_PER_SESSION, Story, run_sessions

pytest.importorskip("deepspeed", reason="the extra glmtune[deepspeed] is not installed")
ALL, SOME = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"), ("zero2", "zero3_offload")
ONE = "trainer.per_device_train_batch_size=4"  # the rows that two processes take together
TWO = "trainer.per_device_train_batch_size=2"
# 37 rows, 8 in a step: the last step of an epoch has 5, its last forward pass a single one for two processes.
COMMON = [
    *(
        "+recipe=full",
        "retention=null",
        "data=files",
        "data.layout=adgen",
        "data.max_train_samples=37",
        "resume=force",
    ),
    *("trainer.learning_rate=1e-3", "trainer.max_steps=10", "trainer.gradient_accumulation_steps=2"),
    *("trainer.logging_steps=1", "trainer.save_steps=5", "trainer.report_to=[]"),
]
# 37 rows in 20 packs: the third step of an epoch has four. Ungrouped, accumulation does not change the order.
PACKED = [
    *(
        "data.packing=true",
        "data.packing_length=96",
        "data.max_source_length=40",
        "data.max_target_length=55",
    ),
    *("trainer.max_steps=5", "trainer.group_by_length=false"),
]
ACCUMULATED, AT_ONCE = TWO, "trainer.per_device_train_batch_size=4 trainer.gradient_accumulation_steps=1"
PACKS = {
    "packed-zero2-accumulated": ("zero2", ACCUMULATED),
    "packed-zero3-at-once": ("zero3", AT_ONCE),
    "packed-zero2-at-once": ("zero2", AT_ONCE),
    "packed-zero3-accumulated": ("zero3", ACCUMULATED),
}
SOME_PACKS = tuple(PACKS)[:2]
LENGTHS = ("data.max_source_length=40", "data.max_target_length=55", "trainer.max_steps=5")
OTHER_ROWS = ("streamed", "mixed")


def sessions(base: list[str], train: Path, slow_too: bool) -> list[dict[str, Any]]:
    """The plan: each session with its overrides, processes, and what befalls one of them."""
    plan: list[dict[str, Any]] = []

    def session(name: str, *overrides: str, count: int = 2, **fate: Any) -> None:
        size = ONE if count == 1 else TWO
        words = [*base, size, f"output_dir={fate.pop('run', name)}", *overrides]
        plan.append({"name": name, "overrides": words, "count": count, **fate})

    session("one", count=1)
    for stage in ALL if slow_too else SOME:
        session(stage, f"deepspeed={stage}")
    if slow_too:
        session("ddp")
    session("packed-one", *PACKED, count=1)
    for name, (stage, rows) in PACKS.items():
        if name not in SOME_PACKS and not slow_too:
            continue
        session(name, *PACKED, f"deepspeed={stage}", *rows.split())
    sets = ",".join(
        f"{{name:{name},weight:{weight},train_file:'{train}'}}" for name, weight in (("a", 1), ("b", 3))
    )
    words = {"streamed": ["data.streaming=true", "data.shuffle_buffer=9"], "mixed": [f"data.mix=[{sets}]"]}
    for rows in OTHER_ROWS if slow_too else ():
        more = ["data.train_file=null", "data.validation_file=null"] if rows == "mixed" else []
        session(f"{rows}-one", *LENGTHS, *words[rows], *more, count=1)
        session(f"{rows}-two", *LENGTHS, *words[rows], *more, "deepspeed=zero2")
    session("killed", "deepspeed=zero2", fate="killed_in_step", step=8)
    session("killed-again", "deepspeed=zero2", run="killed", fate="killed_while_saving", step=10)
    session("killed-resumed", "deepspeed=zero2", run="killed")
    session("stopped", "deepspeed=zero2", fate="told_to_stop", step=3)
    session("resharded", "deepspeed=zero3", run="stopped", count=1)
    session("full-disk", "deepspeed=zero3", fate="full_disk", step=10)
    session("blind", "deepspeed=zero2", fate="no_data")
    session("cramped", "deepspeed=zero2", fate="little_memory", step=7)
    session("three", "deepspeed=zero2", "resume=auto", run="stopped", count=3)
    session("plain", "resume=force", run="cramped", count=1)
    return plan


@pytest.fixture(scope="module")
def story(
    tiny_base: Path, tiny_rows: dict[str, Path], slow_too: bool, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    folder = tmp_path_factory.mktemp("processes")
    files = [f"data.{name}_file={tiny_rows[name]}" for name in ("train", "validation")]
    plan = sessions([*COMMON, f"model.source={tiny_base}", *files], tiny_rows["train"], slow_too)
    return run_sessions(folder, plan)


@pytest.mark.parametrize("stage", slow_except(SOME, (*ALL, "ddp")))
def test_two_processes_equal_one(story: Story, stage: str) -> None:
    assert story.codes("one") == [0], story.said("one", 0)
    assert story.codes(stage) == [0, 0], story.said(stage, 0) + story.said(stage, 1)
    assert len(story.losses(stage)) == 10
    assert story.losses(stage) == pytest.approx(story.losses("one"), rel=2e-5)
    expected, found = story.weights("one"), story.weights(stage)
    assert expected.keys() == found.keys()
    assert max(float((expected[key] - found[key]).abs().max()) for key in expected) < 2e-5


@pytest.mark.parametrize("name", slow_except(SOME_PACKS, PACKS))
def test_packed_rows_too(story: Story, name: str) -> None:
    assert story.codes("packed-one") == [0], story.said("packed-one", 0)
    assert story.codes(name) == [0, 0], story.said(name, 0) + story.said(name, 1)
    assert len(story.losses(name)) == 5
    assert story.losses(name) == pytest.approx(story.losses("packed-one"), rel=2e-5)
    expected, found = story.weights("packed-one"), story.weights(name)
    assert max(float((expected[key] - found[key]).abs().max()) for key in expected) < 2e-5


@pytest.mark.parametrize("rows", slow_except((), OTHER_ROWS))
def test_rows_streamed_and_mixed_too(story: Story, rows: str) -> None:
    """Every process draws the same sequence of rows and learns its share of each step."""
    one, two = f"{rows}-one", f"{rows}-two"
    assert story.codes(one) == [0], story.said(one, 0)
    assert story.codes(two) == [0, 0], story.said(two, 0) + story.said(two, 1)
    assert len(story.losses(two)) == 5
    assert story.losses(two) == pytest.approx(story.losses(one), rel=2e-5)


def test_evaluation_counts_every_row_once(story: Story, slow_too: bool) -> None:
    def evaluations(run: str) -> list[tuple[float, int]]:
        lines = (story.folder / run / "trainer_log.jsonl").read_text().splitlines()
        return [(e["eval_loss"], e["eval_tokens"]) for e in map(json.loads, lines) if "eval_loss" in e]

    assert len(evaluations("one")) == 3
    for run in ALL if slow_too else SOME:
        assert evaluations(run) == [(pytest.approx(loss, rel=2e-5), n) for loss, n in evaluations("one")]


def test_a_rank_killed_twice_then_resumed_equals_never_killed(story: Story) -> None:
    assert story.codes("killed")[1] == story.codes("killed-again")[1] == -9
    assert story.codes("killed")[0] == story.codes("killed-again")[0] == 1
    for name in ("killed", "killed-again"):
        assert "lost the other processes" in story.said(name, 0)
    assert "Checkpoint-5 is intact" in story.said("killed", 0)
    assert story.codes("killed-resumed") == [0, 0], story.said("killed-resumed", 0)
    assert "going on from killed/checkpoint-5" in story.said("killed-resumed", 0)
    assert story.losses("killed") == story.losses("zero2")
    expected, found = story.weights("zero2"), story.weights("killed")
    assert all(bool((expected[key] == found[key]).all()) for key in expected)
    assert not [path.name for path in (story.folder / "killed").iterdir() if path.name.startswith(".")]


def test_sigterm_on_one_rank_saves_and_another_number_of_processes_goes_on(story: Story) -> None:
    assert story.codes("stopped") == [143, 143], story.said("stopped", 0)
    assert "SIGTERM: stopped after step 3" in story.said("stopped", 0)
    assert story.codes("resharded") == [0], story.said("resharded", 0)  # one process, and stage 3 now
    assert story.losses("stopped") == pytest.approx(story.losses("one"), rel=2e-5)


def test_full_disk_on_one_rank_keeps_the_last_checkpoint(story: Story) -> None:
    assert story.codes("full-disk") == [1, 1]
    for rank in (0, 1):
        said = story.said("full-disk", rank)
        assert "process 1 on" in said
        assert "could not write its part of the checkpoint" in said
        assert "Traceback" not in said
    assert "checkpoint-5 is intact" in story.said("full-disk", 0)
    assert story.steps_saved("full-disk") == ["checkpoint-5"]
    assert not list((story.folder / "full-disk").glob(".checkpoint*"))


def test_a_rank_without_the_data_says_so_and_nobody_hangs(story: Story) -> None:
    assert story.codes("blind") == [1, 1]
    assert "/nowhere/train.json" in story.said("blind", 1)
    assert "process 1: /nowhere/train.json" in story.said("blind", 0)
    assert story.results["blind"]["seconds"] < SECONDS_PER_SESSION


def test_a_rank_out_of_memory_says_what_to_lower(story: Story) -> None:
    assert story.codes("cramped") == [1, 1]
    assert "Memory ran out at step 7" in story.said("cramped", 1)
    assert "Traceback" not in story.said("cramped", 1)
    assert story.steps_saved("cramped") == ["checkpoint-5"]


def test_another_number_of_rows_per_step_is_refused(story: Story) -> None:
    assert story.codes("three") == [2, 2, 2]
    assert "`rows per optimizer step`: 8 then, 12 now" in story.said("three", 0)
    assert "launch.num_processes" in story.said("three", 0)


def test_going_on_without_deepspeed_is_refused(story: Story) -> None:
    assert story.codes("plain") == [1]
    assert "add `deepspeed=zero2`" in story.said("plain", 0)
