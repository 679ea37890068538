"""What a run says: log lines, the summary, the plot, the card."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from glmtune.training.callbacks import ProgressDisplay, StopOnSignal, TrainingLog, describe_step
from glmtune.training.log import append_entry, read_log
from glmtune.training.report import environment, model_card, plot_loss, summarize_run

STEP = {"learning_rate": 0.01, "grad_norm": 0.5, "tokens_per_second": 100.0, "memory_bytes": 2**30}
ENTRIES: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 3.0, "eval_accuracy": 0.1},
    {"step": 10, "loss": 2.0, "tokens": 400, **STEP},
    {"step": 10, "eval_loss": 2.5, "eval_accuracy": 0.3},
    {"step": 15, "loss": 1.0, "tokens": 700, **STEP, "tokens_per_second": 300.0, "memory_bytes": 2**31},
    {"step": 15, "eval_loss": 2.6, "eval_accuracy": 0.4},
]


def test_summary() -> None:
    assert summarize_run(ENTRIES) == {
        "train_loss": pytest.approx((10 * 2.0 + 5 * 1.0) / 15),
        "final_train_loss": 1.0,
        "train_tokens": 700,
        "train_tokens_per_second": 200.0,
        "peak_memory_bytes": 2**31,
        "baseline_eval_loss": 3.0,
        "final_eval_loss": 2.6,
        "baseline_eval_accuracy": 0.1,
        "final_eval_accuracy": 0.4,
        "best_eval_loss": 2.5,
        "best_step": 10,
    }
    by_accuracy = summarize_run(ENTRIES, metric="accuracy")
    assert (by_accuracy["best_eval_accuracy"], by_accuracy["best_step"]) == (0.4, 15)
    assert summarize_run([]) == {}
    assert "final_eval_loss" not in summarize_run(ENTRIES[:2])


def test_log_is_read_up_to_a_cut_line(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    for entry in ENTRIES[:2]:
        append_entry(tmp_path, entry)
    with (tmp_path / "trainer_log.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    assert read_log(tmp_path) == ENTRIES[:2]


def test_resumed_log_drops_steps_to_be_repeated(tmp_path: Path) -> None:
    for entry in ENTRIES:
        append_entry(tmp_path, entry)
    state: Any = SimpleNamespace(global_step=10, num_input_tokens_seen=400, is_world_process_zero=True)
    TrainingLog(tmp_path).on_train_begin(SimpleNamespace(), state, SimpleNamespace())  # type: ignore[arg-type]
    assert read_log(tmp_path) == ENTRIES[:3]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal: bool, tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=160, highlight=False)
    log = TrainingLog(tmp_path)
    progress = ProgressDisplay(log, console)
    state: Any = SimpleNamespace(global_step=0, max_steps=20, is_local_process_zero=True)
    nothing: Any = SimpleNamespace()
    progress.on_train_begin(nothing, state, nothing)
    state.global_step = 10
    progress.on_step_end(nothing, state, nothing)
    for entry in ENTRIES[1:3]:
        log.last = entry
        progress.on_log(nothing, state, nothing)
        progress.on_log(nothing, state, nothing)  # the trainer logs once more at its end
    progress.on_train_end(nothing, state, nothing)
    text = output.getvalue()
    assert "loss 2.0000  lr 1.00e-02  grad 0.50  100 tok/s  1.0 GiB  eta" in text
    assert text.count("eval loss 2.5000") == 1
    assert "10/20" in text
    assert terminal or text.count("\n") == 2


def test_describe_without_gradient() -> None:
    assert describe_step({**ENTRIES[1], "grad_norm": 0.0}, remaining=3600).endswith("eta 1:00:00")


def test_second_interrupt_stops_at_once() -> None:
    signals = StopOnSignal()
    signals._note(2, None)
    with pytest.raises(KeyboardInterrupt):
        signals._note(2, None)


def test_plot(tmp_path: Path) -> None:
    plot_loss(ENTRIES, tmp_path / "loss.png")
    plot_loss([], tmp_path / "empty.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_environment_is_plain() -> None:
    values = environment(seed=4)
    assert json.loads(json.dumps(values)) == values
    assert values["seed"] == 4
    assert {"glmtune", "python", "packages", "memory_bytes", "gpus"} <= values.keys()


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ("prefix", ["P-Tuning v2 prefix", 'load_model("glm-tiny", prefix="last")']),
        ("lora", ["LoRA adapter", "PeftModel.from_pretrained"]),
        ("full", ["fully tuned model", 'load_model("last")']),
    ],
)
def test_model_card(tune: str, words: list[str]) -> None:
    settings = {
        "tune": tune,
        "seed": 1,
        "model": {"source": "glm-tiny"},
        "trainer": {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.02,
        },
    }
    results = {
        "glmtune": "0.1",
        "steps": 15,
        "base_fingerprint": "b" * 64,
        "data_fingerprint": "d" * 64,
        "train_path": "rows.json",
        "train_rows": 40,
        "trained_parameters": 1200,
        "all_parameters": 5_000,
        **summarize_run(ENTRIES),
    }
    card = model_card(settings, results)
    for word in [
        *words,
        "15 steps of 8 rows",
        "| baseline eval loss | 3.0000 |",
        "1,200 of 5,000",
        "`" + "b" * 16 + "`",
    ]:
        assert word in card, card
