"""What a run says: log lines, the summary, the plot, the card."""

from __future__ import annotations

import io
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from rich.cells import cell_len

from glmtune.data.truncation import TruncationCounts, Unseen
from glmtune.terminal.console import Console
from glmtune.terminal.progress import fit
from glmtune.training.callbacks import ProgressDisplay, StopOnSignal, TrainingLog, step_parts
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


def without_time(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries without the time of day, which every line has to have."""
    assert all(datetime.fromisoformat(entry["time"]).tzinfo is not None for entry in entries)
    return [{name: value for name, value in entry.items() if name != "time"} for entry in entries]


def test_log_tells_the_time_and_its_checksum_does_not(tmp_path: Path) -> None:
    for second in range(2):
        with mock.patch("glmtune.training.log.datetime") as clock:
            clock.now.return_value = datetime(2026, 1, 1, second=second, tzinfo=UTC)
            append_entry(tmp_path, ENTRIES[1])
    first, again = (json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines())
    assert first["time"] == "2026-01-01T00:00:00+00:00"
    assert first["time"] != again["time"]
    assert first["checksum"] == again["checksum"], "a run that was killed has the lines of one that was not"


def test_log_is_read_up_to_a_cut_line(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    for entry in ENTRIES[:2]:
        append_entry(tmp_path, entry)
    with (tmp_path / "trainer_log.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    assert without_time(read_log(tmp_path)) == ENTRIES[:2]


def test_resumed_log_drops_steps_to_be_repeated(tmp_path: Path) -> None:
    for entry in ENTRIES:
        append_entry(tmp_path, entry)
    state: Any = SimpleNamespace(global_step=10, num_input_tokens_seen=400, is_world_process_zero=True)
    TrainingLog(tmp_path).on_train_begin(SimpleNamespace(), state, SimpleNamespace())  # type: ignore[arg-type]
    assert without_time(read_log(tmp_path)) == ENTRIES[:3]


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


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    ("loss", "grad", "speed", "memory", "steps"),
    [
        (2.0, 0.5, 812.4, 3 * 2**30, 3000),
        (123456.789, 1e7, 9_876_543.2, 1400 * 2**30, 1_000_000),
        (0.0001, 0.0, 0.4, 0, 10),
    ],
)
def test_the_step_counter_fits_80_columns(
    terminal: bool, loss: float, grad: float, speed: float, memory: int, steps: int, tmp_path: Path
) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=80, highlight=False, color_system=None)
    log = TrainingLog(tmp_path)
    progress = ProgressDisplay(log, console)
    state: Any = SimpleNamespace(global_step=steps - 7, max_steps=steps, is_local_process_zero=True)
    nothing: Any = SimpleNamespace()
    progress.on_train_begin(nothing, state, nothing)
    state.global_step = steps - 6
    figures = {"loss": loss, "learning_rate": 2e-2, "grad_norm": grad, "tokens_per_second": speed}
    log.last = {"step": steps - 6, **figures, "memory_bytes": memory}
    progress.on_log(nothing, state, nothing)
    progress.on_step_end(nothing, state, nothing)
    progress.on_train_end(nothing, state, nothing)
    said = re.sub("\x1b\\[[?0-9;]*[A-Za-z]", "", output.getvalue())
    lines = [line.rstrip() for line in re.split("[\r\n]", said) if line.strip()]
    assert any(f"{steps - 6}/{steps}  loss" in line and "eta " in line for line in lines)
    assert max(map(cell_len, lines)) <= 80, lines


def test_a_usual_step_has_all_figures_in_80_columns() -> None:
    entry = {**ENTRIES[1], "tokens_per_second": 3581.0, "grad_norm": 0.66}
    line = fit([("step 290/400", 0), *step_parts(entry), ("eta 3:16", 1)], 80)
    assert line == "step 290/400  loss 2.0000  lr 1.00e-02  grad 0.66  3581 tok/s  1.0 GiB  eta 3:16"


def test_without_a_gradient_norm() -> None:
    parts = step_parts({name: value for name, value in ENTRIES[1].items() if name != "grad_norm"})
    assert ("grad 0.00", 4) in parts
    assert step_parts({}) == []


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
    assert values["packages"]["deepspeed"] is None or values["packages"]["deepspeed"][0].isdigit()


def test_environment_of_a_launched_process_has_the_typed_command(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = "glmtune train +recipe=full 'data.source_prefix=${oc.env:TOKEN}'"
    monkeypatch.setenv("GLMTUNE_COMMAND", typed)
    monkeypatch.setattr("sys.argv", ["/x/glmtune/__main__.py", "train", "--settings", "/tmp/settings.json"])
    assert environment(seed=4)["command"] == typed


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
    unseen = Unseen(8, TruncationCounts(rows_with_cut_answer=2, cut_answer_tokens=9), ("a|b\nc",))
    results["trained_with"] = {"max_source_length": 232, "max_target_length": 104}
    results["unseen"] = {"train": unseen.values()}
    card = model_card(settings, results)
    assert "| longest prompt, answer | 232, 104 tokens |" in card
    cut = "8 rows; cut: 2 (25.0 %) lose the answer's end (9 tokens)"
    assert f"| train rows | {cut}; not read: 1 (a\\|b c) |" in card
    for word in [
        *words,
        "15 steps of 8 rows",
        "| baseline eval loss | 3.0000 |",
        "1,200 of 5,000",
        "`" + "b" * 16 + "`",
    ]:
        assert word in card, card
