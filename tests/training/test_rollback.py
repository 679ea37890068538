"""A loss that is not finite sends the run back to its last checkpoint at a lower rate, exactly and resumably."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from glmtune.errors import TrainingError
from glmtune.prefix.attach import prefix_of
from glmtune.training.checkpoints.folder import latest_checkpoint
from glmtune.training.log import read_log
from glmtune.training.rollback import EVIDENCE_FILE
from glmtune.training.run_folder import changed_settings
from glmtune.training.session import train
from glmtune.training.settings import SCHEDULERS
from glmtune.training.trainer import GlmTrainer
from glmtune.training.watching.rollback_log import (
    Rollback,
    keep_rollbacks,
    rate_factor,
    read_rollbacks,
    scale_rate,
)

MakeTrainer = Callable[..., GlmTrainer]


def spoil(trainer: GlmTrainer, at: Collection[int]) -> None:
    """Make the loss NaN in training forward passes of these numbers, counted from 1."""
    calls = 0

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += module.training
        return output * float("nan") if calls in at and module.training else output

    trainer.tuned.model.lm_head.register_forward_hook(hook)


def course(trainer: GlmTrainer) -> tuple[list[tuple[int, float, float]], Tensor]:
    """Steps with loss and rate as logged, and the weights at the end."""
    lines = [entry for entry in read_log(trainer.run_folder) if "loss" in entry]
    weights = prefix_of(trainer.tuned.model).embedding.weight.detach()
    return [(line["step"], line["loss"], line["learning_rate"]) for line in lines], weights


VALUES = {"max_steps": 8, "save_steps": 3, "lr_scheduler_type": "constant", "learning_rate": 0.1}


def test_it_goes_back_once_and_ends_well(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(**VALUES)
    spoil(trainer, {5})
    train(trainer, None)
    lines, weights = course(trainer)
    assert [(step, rate) for step, _, rate in lines] == [(s, 0.1 if s <= 3 else 0.05) for s in range(1, 9)]
    assert bool(torch.isfinite(weights).all())
    assert read_rollbacks(tmp_path / "run") == [
        Rollback(failed_step=5, checkpoint=3, rate=0.5, learning_rate=0.1)
    ]
    alert = next(entry for entry in read_log(tmp_path / "run") if entry.get("alert") == "rollback")
    assert (alert["step"], alert["failed_step"]) == (3, 5)
    assert (
        "going back from step 5 to checkpoint-3, with 0.5 of the learning rate (rollback 1 of 2)"
        in alert["text"]
    )


def test_the_evidence(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(**VALUES, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    collate, fed = trainer.data_collator, []
    trainer.data_collator = lambda rows: fed.append([row["length"] - 6 for row in rows]) or collate(rows)
    trainer.eval_dataset, trainer.args.eval_strategy = None, "no"
    spoil(trainer, {10})  # the second batch of step 5
    train(trainer, None)
    evidence = json.loads((tmp_path / "run" / EVIDENCE_FILE).read_text())[0]
    assert (evidence["step"], evidence["what"], evidence["learning_rate"]) == (5, "loss", 0.1)
    assert evidence["rows"] == [*fed[8], *fed[9]]  # row N has N + 6 tokens
    assert [str(loss) == "nan" for loss in evidence["batch_losses"]] == [False, True]
    assert [step for step, _ in evidence["losses"]] == [1, 2, 3, 4]
    assert evidence["weights"] == ["model.prefix_encoder.embedding.weight"]
    assert str(evidence["grad_norm"]) == "nan"


def test_killed_after_a_rollback_and_resumed_equals_not_killed(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    whole = make_trainer(folder="whole", **VALUES)
    spoil(whole, {5})
    train(whole, None)

    killed = make_trainer(folder="killed", **VALUES)
    spoil(killed, {5})
    original = killed._get_grad_norm

    def die(*args: Any, **kwargs: Any) -> Any:
        if killed.state.global_step == 4 and read_rollbacks(killed.run_folder):
            raise InterruptedError("killed")
        return original(*args, **kwargs)

    killed._get_grad_norm = die  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="killed"):
        train(killed, None)

    for step in (3, 6):  # from the very checkpoint gone back to, then from one made at the lower rate
        resumed = make_trainer(folder="killed", **VALUES)
        keep_rollbacks(resumed.run_folder, step)
        train(resumed, tmp_path / "killed" / f"checkpoint-{step}")
        assert course(resumed)[0] == course(whole)[0]
        assert torch.equal(course(resumed)[1], course(whole)[1])


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_every_schedule_is_scaled(schedule: str) -> None:
    def rates(factor: float) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=9)
        assert isinstance(scheduler, LambdaLR)
        used = []
        for step in range(9):
            if step == 4:
                scale_rate(scheduler, factor)
            used.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return used

    plain, scaled = rates(1.0), rates(0.5)
    assert scaled[:4] == plain[:4]
    assert scaled[4:] == pytest.approx([rate / 2 for rate in plain[4:]])


def test_it_stops_after_the_last_rollback(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(**VALUES)
    spoil(trainer, range(5, 100))
    with pytest.raises(TrainingError) as caught:
        train(trainer, None)
    for word in ("loss of step 4 is not finite", "0.025", "2 rollbacks did not help", "checkpoint-3, is intact",
                 EVIDENCE_FILE, "rows in the training data", "trainer.learning_rate"):  # fmt: skip
        assert word in str(caught.value), str(caught.value)
    assert [rollback.failed_step for rollback in read_rollbacks(tmp_path / "run")] == [5, 4]
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-3"
    assert len(json.loads((tmp_path / "run" / EVIDENCE_FILE).read_text())) == 3


def test_with_a_count_of_zero_it_stops_at_once(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(**VALUES, max_rollbacks=0)
    spoil(trainer, {5})
    with pytest.raises(TrainingError, match=r"loss of step 5 is not finite.*checkpoint-3, is intact"):
        train(trainer, None)
    assert read_rollbacks(tmp_path / "run") == []


def test_before_the_first_checkpoint_there_is_nowhere_to_go(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(**VALUES)
    spoil(trainer, {2})
    with pytest.raises(TrainingError, match=r"step 2 is not finite.*No checkpoint was due yet"):
        train(trainer, None)


def test_divided_weights_need_a_new_start(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(**VALUES)
    spoil(trainer, {5})
    original = trainer._get_grad_norm

    def divided(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 4:
            trainer.uses_fsdp2 = True  # noticed on the way back only; dividing needs several processes
        return original(*args, **kwargs)

    trainer._get_grad_norm = divided  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"The same command starts anew, going back.*checkpoint-3"):
        train(trainer, None)
    resumed = make_trainer(**VALUES)
    train(resumed, resumed.run_folder / "checkpoint-3")
    assert [rate for _, _, rate in course(resumed)[0]] == [0.1] * 3 + [0.05] * 5


def test_rollbacks_of_later_checkpoints_are_forgotten(tmp_path: Path) -> None:
    items = [
        {"failed_step": 5, "checkpoint": 3, "rate": 0.5},
        {"failed_step": 9, "checkpoint": 6, "rate": 0.5},
    ]
    (tmp_path / "rollbacks.json").write_text(json.dumps(items))
    assert rate_factor(tmp_path, 6, 0.1) == 0.25
    assert rate_factor(tmp_path, 5, 0.1) == 0.5
    keep_rollbacks(tmp_path, 6)
    assert len(read_rollbacks(tmp_path)) == 2
    keep_rollbacks(tmp_path, 5)
    assert [rollback.checkpoint for rollback in read_rollbacks(tmp_path)] == [3]
    keep_rollbacks(tmp_path, 0)
    assert read_rollbacks(tmp_path) == []
    assert rate_factor(tmp_path, 3, 0.1) == 1.0


def test_a_factor_of_one_changes_nothing() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = LambdaLR(optimizer, lambda step: 0.7**step)
    before = scheduler.state_dict()
    scale_rate(scheduler, 1.0)
    assert scheduler.state_dict() == before


def test_a_setting_of_a_newer_version_does_not_stop_an_older_run() -> None:
    stored = {"trainer": {"learning_rate": 1.0}}
    now = {"trainer": {"learning_rate": 1.0, "max_rollbacks": 2, "torch_compile": False, "distributed": None}}
    assert changed_settings(stored, now) == []
    now["trainer"]["torch_compile"] = True
    assert changed_settings(stored, now) == ["`trainer.torch_compile`: None then, True now"]
