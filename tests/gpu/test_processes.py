"""A group of one process on a GPU, over NCCL, plain and under ZeRO-2: the losses are those of no group on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.gpu.devices import on_every_device

COMMON = (
    *("+recipe=full", "trainer.learning_rate=1e-3", "retention=null", "data=files", "data.layout=adgen"),
    *("data.max_source_length=40", "data.max_target_length=55", "trainer.max_steps=3"),
    *("trainer.logging_steps=1", "trainer.per_device_train_batch_size=4"),
    *("trainer.gradient_accumulation_steps=2", "trainer.report_to=[]", "seed=3"),
)
TOLERANCE = 2e-3


def train(program: list[str], base: Path, rows: dict[str, Path], folder: Path, *more: str) -> list[float]:
    """Train in a process of its own, and return its losses."""
    words = [
        *COMMON,
        f"model.source={base}",
        f"data.train_file={rows['train']}",
        f"output_dir={folder}",
        *more,
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *program, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    entries = map(json.loads, (folder / "trainer_log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.fixture(scope="module")
def alone(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """Losses without a group, on the CPU, in float32."""
    from recipes.train import COMMAND, run
    from recipes.words.compose import load_settings

    folder = tmp_path_factory.mktemp("alone") / "run"
    words = [
        *COMMON,
        f"model.source={tiny_base}",
        f"data.train_file={tiny_rows['train']}",
        "model.device=cpu",
    ]
    run(load_settings(COMMAND, [*words, "trainer.precision=fp32", f"output_dir={folder}"]))
    entries = map(json.loads, (folder / "trainer_log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@on_every_device
def test_a_group_of_one(
    device: str, alone: list[float], tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    found = tmp_path / "found.json"
    program = [str(REPO / "tests" / "gpu" / "one_process.py"), str(found)]
    more = (f"model.device={device}", "trainer.precision=fp32")
    assert train(program, tiny_base, tiny_rows, tmp_path / "run", *more) == pytest.approx(
        alone, rel=TOLERANCE
    )
    assert json.loads(found.read_text()) == {
        "backend": "nccl" if device == "cuda" else "gloo",
        "sum": [1.0, 1.0, 1.0],
    }


@on_every_device
def test_zero_2(
    device: str, alone: list[float], tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="the extra glmtune[deepspeed] is not installed")
    more = (f"model.device={device}", "deepspeed=zero2", "launch.num_processes=1", "trainer.precision=fp32")
    found = train(["-m", "glmtune", "train"], tiny_base, tiny_rows, tmp_path / "run", *more)
    assert found == pytest.approx(alone, rel=TOLERANCE)
    if device == "cuda":  # in the type in which 6B models are trained
        more = (
            f"model.device={device}",
            "deepspeed=zero2",
            "launch.num_processes=1",
            "trainer.precision=bf16",
        )
        found = train(["-m", "glmtune", "train"], tiny_base, tiny_rows, tmp_path / "bf16", *more)
        assert found == pytest.approx(alone, rel=3e-2)
