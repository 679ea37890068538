"""A loss that is not finite in one of two processes under ZeRO: both go back, and stop when that does not help."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.stories import Story, run_sessions
from tests.e2e.test_ds_launch import SCRIPT, ran

pytest.importorskip("deepspeed", reason="the extra glmtune[deepspeed] is not installed")
COMMON = [
    *("+recipe=full", "retention=null", "data=files", "data.layout=adgen", "data.max_train_samples=37"),
    *("trainer.learning_rate=1e-3", "trainer.max_steps=6", "trainer.gradient_accumulation_steps=2"),
    *("trainer.per_device_train_batch_size=2", "trainer.logging_steps=1", "trainer.save_steps=2"),
    *("trainer.report_to=[]", "trainer.lr_scheduler_type=constant"),
]
ONCE = "trainer.max_rollbacks=1"
AGAIN = 75


def sessions(base: list[str], slow_too: bool) -> list[dict[str, Any]]:
    plan: list[dict[str, Any]] = []

    def session(name: str, run: str, *overrides: str, **fate: Any) -> None:
        words = [*base, f"output_dir={run}", *overrides]
        plan.append({"name": name, "overrides": words, "count": 2, **fate})

    session("zero2-spoilt", "zero2", "deepspeed=zero2", fate="not_finite", step=5)
    session("zero2-goes-on", "zero2", "deepspeed=zero2")
    if not slow_too:
        return plan
    session("zero3-spoilt", "zero3", "deepspeed=zero3", ONCE, fate="not_finite", step=3)
    session("zero3-in-vain", "zero3", "deepspeed=zero3", ONCE, fate="not_finite", step=4)
    session("gradient", "gradient", "deepspeed=zero2", "trainer.precision=bf16", fate="bad_gradient", step=3)
    return plan


@pytest.fixture(scope="module")
def story(
    tiny_base: Path, tiny_rows: dict[str, Path], slow_too: bool, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    files = [f"data.train_file={tiny_rows['train']}", "data.validation_file=null"]
    plan = sessions([*COMMON, f"model.source={tiny_base}", *files], slow_too)
    return run_sessions(tmp_path_factory.mktemp("not_finite"), plan)


def evidence(story: Story, run: str) -> list[dict[str, Any]]:
    return json.loads((story.folder / run / "not_finite.json").read_text())


def test_both_go_back(story: Story) -> None:
    assert story.codes("zero2-spoilt") == [AGAIN, AGAIN], story.said("zero2-spoilt", 0)
    for rank in (0, 1):
        said = story.said("zero2-spoilt", rank)
        assert "The loss of step 5 is not finite" in said
        assert "The same command starts anew, going back from step 5 to checkpoint-4" in said
        assert "Traceback" not in said
    found = evidence(story, "zero2")[0]
    assert (found["step"], found["what"], found["processes"]) == (5, "loss", [1])
    assert [str(loss) == "nan" for loss in found["batch_losses"]] == [False, False, True, False]
    assert len(found["rows"]) == 5  # the last ones of the epoch, of both processes


def test_the_next_session_goes_on_at_the_lower_rate(story: Story) -> None:
    assert story.codes("zero2-goes-on") == [0, 0], story.said("zero2-goes-on", 0)
    assert "going on from zero2/checkpoint-4" in story.said("zero2-goes-on", 0)
    assert story.logged("zero2", "step") == [1, 2, 3, 4, 5, 6]
    assert story.logged("zero2", "learning_rate") == [1e-3] * 4 + [5e-4] * 2
    alerts = [entry["alert"] for entry in story.log("zero2") if "alert" in entry]
    assert "rollback" in alerts


@pytest.mark.slow
def test_after_the_last_rollback_both_stop_with_the_evidence(story: Story) -> None:
    assert story.codes("zero3-spoilt") == [AGAIN, AGAIN], story.said("zero3-spoilt", 0)
    assert story.codes("zero3-in-vain") == [1, 1], story.said("zero3-in-vain", 0)
    for rank in (0, 1):
        said = story.said("zero3-in-vain", rank)
        assert "1 rollback did not help. Everything known is in zero3/not_finite.json" in said
        assert "The last good checkpoint, checkpoint-2, is intact" in said
    assert [(found["step"], found["learning_rate"]) for found in evidence(story, "zero3")] == [
        (3, 1e-3),
        (4, 5e-4),
    ]
    assert story.steps_saved("zero3") == ["checkpoint-2"]


@pytest.mark.slow
def test_a_gradient_that_is_not_finite(story: Story) -> None:
    assert story.codes("gradient") == [AGAIN, AGAIN], story.said("gradient", 0)
    assert "The gradient norm of step 3 is not finite" in story.said("gradient", 0)
    assert story.steps_saved("gradient") == ["checkpoint-2"]


SPOIL_ONCE = """
import os
from pathlib import Path

if os.environ.get("RANK") == "1":
    from glmtune.training.trainer import GlmTrainer

    loss = GlmTrainer.compute_loss

    def spoilt(self, *args, **kwargs):
        value = loss(self, *args, **kwargs)
        if self.state.global_step != 4 or Path("spoilt").exists():
            return value
        Path("spoilt").touch()
        return value * float("nan")

    GlmTrainer.compute_loss = spoilt
"""


@pytest.mark.slow
@pytest.mark.parametrize("division", ["deepspeed=zero2", "deepspeed=zero3", "distributed=fsdp"])
def test_the_launcher_starts_it_anew(
    division: str, tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SPOIL_ONCE)
    words = [
        "glmtune",
        "train",
        *COMMON,
        division,
        "launch.num_processes=2",
        "output_dir=run",
        "resume=never",
    ]
    words += [
        f"model.source={tiny_base}",
        f"data.train_file={tiny_rows['train']}",
        "data.validation_file=null",
    ]
    done = ran(words, tmp_path, PYTHONPATH=f"{tmp_path}:{os.environ['PYTHONPATH']}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "spoilt").exists()
    assert "going back from step 5 to checkpoint-4, with 0.5 of the learning rate" in done.stderr
    assert "going on from run/checkpoint-4" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines if "loss" in line] == [1e-3] * 4 + [5e-4] * 2


@pytest.mark.slow
def test_a_rate_far_too_high_ends_with_one_message(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    variables = {"MODEL": str(tiny_base), "DATA": str(tiny_rows["train"]), "LR": "1e30", "OUTPUT_DIR": "run"}
    words = [*SCRIPT, "retention=null", "data.layout=adgen", "trainer.save_steps=1", "trainer.max_steps=5"]
    done = ran([*words, "trainer.per_device_train_batch_size=4"], tmp_path, **variables)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("2 rollbacks did not help") == 1
    assert "Traceback" not in done.stderr
    assert len(json.loads((tmp_path / "run" / "not_finite.json").read_text())) == 3
