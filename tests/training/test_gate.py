"""A run that tunes a gated prefix: it learns, goes on after a stop, and its file is used and begun from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glmtune.errors import CheckpointError, ConfigError
from glmtune.loading import load_base, load_model
from glmtune.training.log import read_log
from recipes.train import TrainResult
from tests.training.test_start_from import first_loss, last_evaluation, train

FILE = "prefix_encoder.safetensors"
WORDS = ["prefix.pre_seq_len=4", "prefix.prefix_projection=true", "prefix.gate=true", "retention=null"]


def tune(base: Path, rows: dict[str, Path], folder: Path, *words: str) -> TrainResult:
    """Tune for four steps."""
    return train(
        *(base, rows, folder, "+recipe=ptuning_official"),
        *WORDS,
        *("trainer.max_steps=4", "trainer.learning_rate=5e-2", "trainer.lr_scheduler_type=constant"),
        *words,
    )


@pytest.fixture(scope="module")
def gated(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; do not change it."""
    folder = tmp_path_factory.mktemp("gate") / "run"
    words = ["trainer.gradient_accumulation_steps=2", "trainer.gradient_checkpointing=true"]
    tune(tiny_base, tiny_rows, folder, *words, "trainer.per_device_train_batch_size=4")
    return folder


def test_it_learns(gated: Path, tiny_base: Path) -> None:
    results = json.loads((gated / "all_results.json").read_text())
    assert results["final_eval_loss"] < results["baseline_eval_loss"]
    first, second, last = (load_file(gated / f"checkpoint-{step}" / FILE) for step in (1, 2, 4))
    assert first["gate.weight"].abs().min() > 0
    moved = [name for name in first if not torch.equal(first[name], second[name])]
    assert set(moved) == set(first) == set(last)
    # The model answers otherwise with it than without.
    tuned, base = load_model(tiny_base, device="cpu", prefix=gated), load_base(tiny_base, device="cpu")
    ids = torch.arange(5, 14)[None]
    with torch.no_grad():
        assert not torch.allclose(tuned(ids).logits, base(ids).logits, atol=1e-3)
        assert torch.equal(tuned(ids, prefix_strength=0.0).logits, base(ids).logits)


def test_a_stopped_run_goes_on_bit_by_bit(
    gated: Path, tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(gated, folder)
    for name in ("checkpoint-3", "checkpoint-4", "last"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "all_results.json").unlink()
    words = ["trainer.gradient_accumulation_steps=2", "trainer.gradient_checkpointing=true"]
    tune(tiny_base, tiny_rows, folder, *words, "trainer.per_device_train_batch_size=4")
    for name, weight in load_file(gated / "last" / FILE).items():
        assert torch.equal(weight, load_file(folder / "last" / FILE)[name]), name
    losses = [[entry["loss"] for entry in read_log(run) if "loss" in entry][-2:] for run in (gated, folder)]
    assert losses[0] == losses[1]


def test_the_gate_cannot_change_on_the_way(
    gated: Path, tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(gated, folder)
    words = ["prefix.gate=false", "trainer.max_steps=5", "resume=force"]
    with pytest.raises((CheckpointError, ConfigError), match=r"`prefix.gate`.*shape of what is tuned"):
        tune(tiny_base, tiny_rows, folder, *words)


def test_a_new_run_begins_with_it(
    gated: Path, tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    words = [f"prefix_path={gated}", "trainer.max_steps=1", "prefix.dropout=0"]
    one_batch = [f"data.train_file={tiny_rows['validation']}"]
    result = tune(tiny_base, tiny_rows, tmp_path / "new", *words, *one_batch)
    assert first_loss(result) == pytest.approx(last_evaluation(gated), rel=1e-5)
    with pytest.raises(ConfigError, match=r"`prefix.gate` is false, but the prefix .* was tuned with one"):
        tune(tiny_base, tiny_rows, tmp_path / "other", *words, "prefix.gate=false")
