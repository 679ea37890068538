"""What goes wrong without stopping a run is reported as it happens; every kind is provoked here."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from torch import Tensor

from glmtune.errors import ConfigError
from glmtune.prefix.attach import prefix_of
from glmtune.training.log import read_log
from glmtune.training.settings import TrainerSettings, WatchSettings
from glmtune.training.trainer import GlmTrainer
from glmtune.training.watching.rules import Alert, Step, StepWatch

MakeTrainer = Callable[..., GlmTrainer]
CALM = [2.0, 2.1, 1.9, 2.05, 1.95] * 5


def seen(steps: Sequence[Step], settings: WatchSettings | None = None) -> list[Alert]:
    watch = StepWatch(settings or WatchSettings())
    return [alert for step in steps for alert in watch.look(step)]


def steps_of(losses: Sequence[float], **values: Any) -> list[Step]:
    return [Step(number, loss, num_labels=8, **values) for number, loss in enumerate(losses, 1)]


# ---- the rules


def test_calm_and_slowly_falling_losses_are_not_reported() -> None:
    assert seen(steps_of(CALM)) == []
    assert seen(steps_of([3.0 * 0.99**n for n in range(200)])) == []
    assert seen(steps_of([0.0101, 0.01] * 30)) == []


def test_a_spike_is_reported_once_with_its_numbers() -> None:
    alerts = seen(steps_of([*CALM, 9.5, 9.6, 2.0, 9.7]))
    assert [(alert.kind, alert.step) for alert in alerts] == [("loss_spike", 26), ("loss_spike", 29)]
    assert alerts[0].values == {"step_loss": 9.5, "median_loss": 2.0}
    for word in ("step 26 is 9.5", "median 2 of", "trainer.learning_rate"):
        assert word in alerts[0].text
    assert seen(steps_of([*CALM, 9.5]), WatchSettings(spike_deviations=0)) == []
    assert seen(steps_of([*CALM[:15], 9.5])) == []  # too early to know what is usual


def test_zero_loss_and_no_labels_are_told_apart() -> None:
    zero, bare = Step(1, 0.0, num_labels=5), Step(2, 0.0, num_labels=0)
    assert [alert.kind for alert in seen([zero])] == ["zero_loss"]
    assert "exactly 0 over 5 labels" in seen([zero])[0].text
    assert [alert.kind for alert in seen([bare])] == ["no_labels"]
    assert "data.loss_on" in seen([bare])[0].text


def test_a_rate_is_dead_after_three_steps_without_effect() -> None:
    dead = steps_of([2.0] * 4, learning_rate=0.0, has_moved=False)
    assert [(alert.kind, alert.step) for alert in seen(dead)] == [("dead_rate", 3)]
    assert "the learning rate is 0" in seen(dead)[0].text
    small = steps_of([2.0] * 3, learning_rate=1e-30, has_moved=False)
    assert "at a learning rate of 1e-30 no weight looked at changed" in seen(small)[0].text
    warming = [replace(dead[0], learning_rate=0.0), *steps_of([2.0] * 5, has_moved=True)]
    assert seen(warming) == []


def test_a_skipped_step_names_the_loss_scale() -> None:
    alerts = seen([Step(4, 2.0, is_skipped=True, loss_scale=32768.0, has_moved=False)])
    assert [alert.kind for alert in alerts] == ["skipped_step"]
    assert "step 4 was skipped" in alerts[0].text
    assert "32768" in alerts[0].text


def test_slow_data_is_a_matter_of_share_and_of_seconds() -> None:
    slow = steps_of([2.0] * 25, wait_seconds=0.6, seconds=1.0)
    alerts = seen(slow)
    assert [(alert.kind, alert.step) for alert in alerts] == [("slow_data", 20)]
    assert "60 % of the time" in alerts[0].text
    assert "trainer.dataloader_num_workers" in alerts[0].text
    assert seen(steps_of([2.0] * 25, wait_seconds=0.4, seconds=1.0)) == []
    assert seen(steps_of([2.0] * 25, wait_seconds=0.006, seconds=0.01)) == []


# ---- provoked in training


def watched(trainer: GlmTrainer) -> tuple[list[dict[str, Any]], str]:
    """Train; return the alerts in the log and what the console showed."""
    shown = io.StringIO()
    trainer.watch.console = Console(file=shown, width=500)
    trainer.eval_dataset = None
    trainer.args.eval_strategy = "no"
    trainer.train()
    return [entry for entry in read_log(trainer.run_folder) if "alert" in entry], shown.getvalue()


def on_loss(trainer: GlmTrainer, change: Callable[[Tensor, int], Tensor]) -> None:
    """Pass the loss of every forward pass, numbered from 1, through a function."""
    calls = 0

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        output["loss"] = change(output["loss"], calls)
        return output

    trainer.tuned.model.register_forward_hook(hook)


def test_a_run_without_trouble_is_silent(make_trainer: MakeTrainer) -> None:
    alerts, shown = watched(make_trainer(max_steps=24, warmup_steps=3, learning_rate=0.01))
    assert (alerts, shown) == ([], "")


def test_loss_spike(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=24)
    on_loss(trainer, lambda loss, call: loss * (20 if call == 22 else 1))
    alerts, shown = watched(trainer)
    assert [(alert["alert"], alert["step"]) for alert in alerts] == [("loss_spike", 22)]
    assert alerts[0]["step_loss"] > 15 * alerts[0]["median_loss"]
    assert shown.startswith("! the loss of step 22 is ")


def test_zero_loss(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=4)
    on_loss(trainer, lambda loss, call: loss * (0 if call >= 3 else 1))
    alerts, _ = watched(trainer)
    assert [(alert["alert"], alert["step"]) for alert in alerts] == [("zero_loss", 3)]
    assert alerts[0]["labels"] > 0


def test_all_labels_masked(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=2)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {**collate(rows), "labels": collate(rows)["labels"].fill_(-100)}
    alerts, shown = watched(trainer)
    assert [(alert["alert"], alert["step"]) for alert in alerts] == [("no_labels", 1)]
    assert "every token of its rows is masked" in shown


@pytest.mark.parametrize("rate", [0.0, 1e-30])
def test_dead_learning_rate(make_trainer: MakeTrainer, rate: float) -> None:
    alerts, _ = watched(make_trainer(max_steps=5, learning_rate=rate))
    assert [(alert["alert"], alert["step"]) for alert in alerts] == [("dead_rate", 3)]


def test_gradient_that_is_not_finite_under_a_scaler(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=4)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)  # what fp16 has on a GPU
    weight, calls = prefix_of(trainer.tuned.model).embedding.weight, 0

    def spoil(gradient: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return gradient * (float("inf") if calls == 2 else 1.0)

    weight.register_hook(spoil)
    alerts, _ = watched(trainer)
    assert [(alert["alert"], alert["step"], alert["loss_scale"]) for alert in alerts] == [
        ("skipped_step", 2, 32.0)
    ]
    assert bool(torch.isfinite(weight).all())


def test_stalled_data_is_reported_while_it_lasts(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=2, stall_seconds=0.1)
    collate, reported = trainer.data_collator, []

    def slow(rows: Any) -> Any:
        if not reported:
            for _ in range(200):
                time.sleep(0.05)
                if trainer.watch.alerts:
                    break
            reported.append(len(trainer.watch.alerts))
        return collate(rows)

    trainer.data_collator = slow
    alerts, shown = watched(trainer)
    assert reported == [1]
    assert [alert["alert"] for alert in alerts] == ["stalled_data"]
    assert "no batch for step 1 came within 0.1 s" in shown


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_rollbacks", -1, "at least 0"),
        ("rollback_rate", 1.0, "between 0 and 1"),
        ("rollback_rate", 0.0, "between 0 and 1"),
        ("spike_deviations", -2.0, "at least 0"),
        ("stall_seconds", -1.0, "at least 0"),
    ],
)
def test_settings_out_of_range(name: str, value: float, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainer.{name}` is {value}.*{words}"):
        TrainerSettings(**cast(Any, {name: value}))
