"""The trainer: losses are means per token, the base stays as it is, what is not finite stops the run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from glmtune.data.collate import DynamicPaddingCollator
from glmtune.errors import TrainingError
from glmtune.prefix.attach import prefix_of
from glmtune.quantization.kernels.native import native_library
from glmtune.quantization.layers.apply import quantize_model
from glmtune.quantization.layers.linear import QuantizedLinear
from glmtune.training.callbacks import StopOnSignal, TrainingLog
from glmtune.training.checkpoints.folder import checkpoints, latest_checkpoint, read_manifest
from glmtune.training.log import read_log
from glmtune.training.session import train
from glmtune.training.starting.fitting import has_ended
from glmtune.training.trainer import GlmTrainer

MakeTrainer = Callable[..., GlmTrainer]


def losses(trainer: GlmTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def loss_and_accuracy_per_token(model: Any, rows: datasets.Dataset) -> tuple[float, float]:
    """One row at a time, every token counted once."""
    total, hits, count = 0.0, 0, 0
    model.eval()
    with torch.no_grad():
        for row in rows:
            batch = DynamicPaddingCollator(0)([row])
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            output = model(**batch)
            total += float(output.loss) * tokens
            hits += int((output.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]).sum())
            count += tokens
    return total / count, hits / count


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_counts_tokens(make_trainer: MakeTrainer, rows: datasets.Dataset, batch_size: int) -> None:
    trainer = make_trainer(per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate()
    loss, accuracy = loss_and_accuracy_per_token(trainer.tuned.model, rows.select(range(10)))
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert metrics["eval_tokens"] == sum(
        sum(label != -100 for label in row["labels"][1:]) for row in rows.select(range(10))
    )


def test_evaluation_leaves_training_alone(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.tuned.model.train()
    before = torch.random.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert trainer.tuned.model.training


def test_accumulation_equals_a_large_batch(make_trainer: MakeTrainer) -> None:
    runs = []
    for folder, batch_size, accumulation in (("large", 6, 1), ("small", 2, 3)):
        trainer = make_trainer(
            folder=folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation
        )
        trainer.train()
        runs.append((losses(trainer), prefix_of(trainer.tuned.model).embedding.weight.detach()))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(make_trainer: MakeTrainer) -> None:
    plain, frugal = make_trainer(folder="plain"), make_trainer(folder="frugal", gradient_checkpointing=True)
    for trainer in (plain, frugal):
        trainer.train()
    assert frugal.tuned.model.model.gradient_checkpointing
    assert losses(plain) == pytest.approx(losses(frugal), rel=1e-6)


def test_only_the_prefix_moves(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    state = trainer.tuned.model.state_dict()
    before = {name: weight.clone() for name, weight in state.items()}
    trainer.train()
    moved = {
        name
        for name, weight in trainer.tuned.model.state_dict().items()
        if not torch.equal(weight, before[name])
    }
    assert moved == {"model.prefix_encoder.embedding.weight"}


def test_loss_falls(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=30, learning_rate=0.5)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.02


def test_checkpoint_holds_the_prefix_and_no_base(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(save_steps=2, save_total_limit=1)
    trainer.train()
    found = checkpoints(tmp_path / "run")
    assert [folder.name for folder in found] == ["checkpoint-4"]
    files = {path.name for path in found[0].iterdir()}
    assert files == {
        "prefix_encoder.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "checkpoint.json",
    } | {
        "trainer_state.json",
        "loss_state.json",
    }
    assert {path.name for path in (tmp_path / "run" / "last").iterdir()} == {
        "prefix_encoder.safetensors",
        "checkpoint.json",
    }


class Spoilt:
    """A collator that makes the labels' loss infinite or NaN from some batch on, through a hook on the model."""

    def __init__(self, model: Any, at: int) -> None:
        self.calls = 0
        self.at = at
        model.lm_head.register_forward_hook(self)

    def __call__(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        self.calls += module.training  # evaluations between the steps do not count
        return output * float("nan") if self.calls > self.at else output


def test_loss_that_is_not_finite(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=8, save_steps=2)
    Spoilt(trainer.tuned.model, at=3)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    logged = f"{losses(trainer)[0]:.4g}"
    for word in (
        "loss of step 4 is not finite",
        "0.0125",
        logged,
        "checkpoint-2, is intact",
        "trainer.learning_rate",
    ):
        assert word in str(caught.value), str(caught.value)
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    assert all(bool(torch.isfinite(weight).all()) for weight in trainer.tuned.model.parameters())


def test_gradient_that_is_not_finite(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    weight = prefix_of(trainer.tuned.model).embedding.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        TrainingError, match=r"gradient norm of step 1 is not finite.*No checkpoint was due yet"
    ):
        trainer.train()
    assert bool(torch.isfinite(weight).all())


def test_early_stopping_saves_and_best_is_the_best(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=40, eval_steps=2, early_stopping_patience=3, save_steps=100)
    worse = iter([3.0, 2.0, 2.5, 2.4, 2.3])
    evaluate = trainer.evaluate

    def scripted(*args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {**evaluate(*args, **kwargs), "eval_loss": next(worse)}
        trainer.state.log_history[-1]["eval_loss"] = metrics["eval_loss"]
        return metrics

    trainer.evaluate = scripted  # type: ignore[method-assign]
    trainer.train()
    assert trainer.state.global_step == 10
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (4, 2.0)
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["checkpoint-10"]
    assert read_manifest(tmp_path / "run" / "best")["step"] == 4
    assert has_ended(make_trainer(max_steps=40), tmp_path / "run" / "checkpoint-10")
    assert not has_ended(make_trainer(max_steps=50), tmp_path / "run" / "checkpoint-10")


def test_resuming_in_the_middle_of_everything(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    values = {"max_steps": 9, "gradient_accumulation_steps": 2, "save_steps": 4, "logging_steps": 3}
    whole = make_trainer(folder="whole", **values)
    whole.train()
    resumed = make_trainer(folder="resumed", **values)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    assert torch.equal(
        prefix_of(resumed.tuned.model).embedding.weight, prefix_of(whole.tuned.model).embedding.weight
    )


def test_settings_of_a_resumed_run_are_todays(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(folder="first", max_steps=6, save_steps=2).train()
    later = make_trainer(folder="later", max_steps=6, save_steps=3, logging_steps=2)
    later.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert [folder.name for folder in checkpoints(tmp_path / "later")] == ["checkpoint-3", "checkpoint-6"]


def test_a_run_made_longer_follows_the_longer_schedule(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    values = {"learning_rate": 0.1, "lr_scheduler_type": "linear", "save_steps": 2}
    train(make_trainer(**values, max_steps=2), None)
    longer = make_trainer(**values, max_steps=5)
    used: list[float] = []
    longer.watch.on_step_end = lambda *args, **kwargs: used.append(longer.watch._rate)  # type: ignore[method-assign]
    train(longer, tmp_path / "run" / "checkpoint-2")
    logged = [entry["learning_rate"] for entry in read_log(tmp_path / "run") if "loss" in entry]
    assert logged == pytest.approx([0.1, 0.05, 0.06, 0.04, 0.02])
    assert used == pytest.approx([0.06, 0.04, 0.02])


def test_best_by_accuracy(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=4, eval_steps=2, metric_for_best_model="accuracy")
    trainer.train()
    reached = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert trainer.args.greater_is_better
    assert trainer.state.best_metric == max(reached)


def test_workers_prepare_the_same_batches(make_trainer: MakeTrainer) -> None:
    alone, helped = make_trainer(folder="alone"), make_trainer(folder="helped", dataloader_num_workers=1)
    for trainer in (alone, helped):
        trainer.train()
    assert losses(alone) == losses(helped)


def test_log_counts_real_tokens(make_trainer: MakeTrainer, rows: datasets.Dataset, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=6)
    trainer.add_callback(TrainingLog(tmp_path / "run"))
    trainer.train()
    entries = [entry for entry in read_log(tmp_path / "run") if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert entries[-1]["tokens"] == sum(rows["length"])  # 6 steps of 4 rows are one epoch
    assert all(entry["tokens_per_second"] > 0 and entry["memory_bytes"] > 0 for entry in entries)
    assert {"loss", "learning_rate", "grad_norm", "epoch", "seconds_per_step"} <= entries[0].keys()


def test_signal_saves_and_stops(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=50)
    signals = StopOnSignal()
    trainer.add_callback(signals)
    evaluate = trainer._get_grad_norm

    def note(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2:
            signals._note(15, None)
        return evaluate(*args, **kwargs)

    trainer._get_grad_norm = note  # type: ignore[method-assign]
    trainer.train()
    assert signals.received == 15
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    manifest = json.loads((tmp_path / "run" / "checkpoint-3" / "checkpoint.json").read_text())
    assert manifest["ended"] is False


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signals_are_noted(name: str) -> None:
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"no {name} on this system")
    with StopOnSignal() as signals:
        os.kill(os.getpid(), number)
        assert signals.received == number


def test_out_of_memory_says_what_to_lower(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()

    def exhaust(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.tuned.model.lm_head.register_forward_hook(exhaust)
    trainer.eval_dataset = None
    with pytest.raises(TrainingError) as caught:
        train(trainer, None, tensorboard=False)
    for word in (
        "at step 1",
        "per_device_train_batch_size` 4",
        "gradient_checkpointing` False",
        "max_source_length",
    ):
        assert word in str(caught.value), str(caught.value)


def test_codes_are_multiplied_natively_once_training_begins(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=2)
    model: Any = trainer.model
    quantize_model(model, "int4")
    trainer.train()
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert layers
    assert all((layer.product is None) == bool(native_library().refusal) for layer in layers)
    assert len(losses(trainer)) == 2
