"""Two processes that write checkpoints beside training: the same files, and the last complete one survives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import slow_except
from tests.e2e.stories import Story, run_sessions
from tests.training.checkpoints.test_saving import contents

pytest.importorskip("deepspeed", reason="the extra glmtune[deepspeed] is not installed")
ALL = {"zero2": "deepspeed=zero2", "zero3": "deepspeed=zero3", "fsdp": "distributed=fsdp", "ddp": "seed=42"}
SOME = ("zero2",)
COMMON = [
    *(
        "+recipe=full",
        "data=files",
        "data.layout=adgen",
        "data.max_train_samples=37",
        "resume=force",
        "retention=null",
    ),
    *("trainer.learning_rate=1e-3", "trainer.max_steps=6", "trainer.gradient_accumulation_steps=2"),
    *("trainer.per_device_train_batch_size=2", "trainer.logging_steps=1", "trainer.save_steps=2"),
    "trainer.report_to=[]",
]


def sessions(base: list[str], slow_too: bool) -> list[dict[str, Any]]:
    """The plan: each session with its overrides, and what befalls process 1."""
    plan: list[dict[str, Any]] = []

    def session(name: str, *overrides: str, beside: bool = True, **fate: Any) -> None:
        words = [*base, f"trainer.async_save={str(beside).lower()}", f"output_dir={fate.pop('run', name)}"]
        plan.append({"name": name, "overrides": [*words, *overrides], "count": 2, **fate})

    for name, division in ALL.items():
        if name not in SOME and not slow_too:
            continue
        session(f"{name}-waits", division, beside=False)
        session(f"{name}-beside", division)
    session("killed", ALL["zero2"], fate="killed_while_saving", step=4)
    if slow_too:
        session("killed-resumed", ALL["zero2"], run="killed")
        session("full-disk", ALL["zero2"], fate="full_disk", step=4)
        session("stopped", ALL["zero2"], fate="told_to_stop", step=3)
    return plan


@pytest.fixture(scope="module")
def story(
    tiny_base: Path, tiny_rows: dict[str, Path], slow_too: bool, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    files = [f"data.{name}_file={tiny_rows[name]}" for name in ("train", "validation")]
    plan = sessions([*COMMON, f"model.source={tiny_base}", *files], slow_too)
    return run_sessions(tmp_path_factory.mktemp("beside"), plan)


@pytest.mark.parametrize("division", slow_except(SOME, ALL))
def test_the_files_are_those_of_a_run_that_waits(story: Story, division: str) -> None:
    for way in ("waits", "beside"):
        name = f"{division}-{way}"
        assert story.codes(name) == [0, 0], story.said(name, 0) + story.said(name, 1)
    assert story.losses(f"{division}-beside") == story.losses(f"{division}-waits")
    for folder in ("checkpoint-2", "checkpoint-4", "checkpoint-6", "last", "best"):
        expected, found = (contents(story.folder / f"{division}-{w}" / folder) for w in ("waits", "beside"))
        assert expected.keys() == found.keys()
        assert [file for file in expected if expected[file] != found[file]] == [], folder


def test_killed_while_writing_the_last_complete_checkpoint_survives(story: Story) -> None:
    assert story.codes("killed") == [1, -9]
    assert "lost the other processes" in story.said("killed", 0)
    assert "Traceback" not in story.said("killed", 0)
    assert "Checkpoint-2 is intact" in story.said("killed", 0)
    assert story.steps_saved("killed")[0] == "checkpoint-2"


@pytest.mark.slow
def test_and_is_gone_on_from(story: Story) -> None:
    assert story.codes("killed-resumed") == [0, 0], story.said("killed-resumed", 0)
    assert "going on from killed/checkpoint-2" in story.said("killed-resumed", 0)
    assert story.losses("killed") == story.losses("zero2-waits")
    assert contents(story.folder / "killed" / "last") == contents(story.folder / "zero2-waits" / "last")


@pytest.mark.slow
def test_full_disk_on_one_rank_stops_both(story: Story) -> None:
    assert story.codes("full-disk") == [1, 1]
    for rank in (0, 1):
        assert "process 1 on" in story.said("full-disk", rank)
        assert "could not write its part of the checkpoint" in story.said("full-disk", rank)
        assert "Traceback" not in story.said("full-disk", rank)
    assert story.steps_saved("full-disk") == ["checkpoint-2"]
    assert not list((story.folder / "full-disk").glob(".checkpoint*"))


@pytest.mark.slow
def test_sigterm_waits_for_the_checkpoint(story: Story) -> None:
    assert story.codes("stopped") == [143, 143], story.said("stopped", 0)
    assert story.steps_saved("stopped") == ["checkpoint-2", "checkpoint-3"]
