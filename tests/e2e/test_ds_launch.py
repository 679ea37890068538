"""The official script from its first line to predictions: launcher, two processes, ZeRO, resume, export."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPO

pytest.importorskip("deepspeed", reason="the extra glmtune[deepspeed] is not installed")
SCRIPT = ["bash", str(REPO / "scripts" / "ds_train_finetune.sh")]
STEPS = [
    "retention=null",
    "trainer.per_device_train_batch_size=4",
    "trainer.logging_steps=1",
    "trainer.save_steps=2",
]


def ran(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **variables}
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=900
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_script_trains_resumes_exports_predicts(
    stage: str, tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    variables = {"DEEPSPEED": stage, "MODEL": str(tiny_base), "DATA": str(tiny_rows["train"]), "LR": "1e-3"}
    variables |= {"OUTPUT_DIR": "run"}
    words = [*SCRIPT, *STEPS, "data.layout=adgen"]
    first = ran([*words, "trainer.max_steps=2"], tmp_path, **variables)
    assert first.returncode == 0, first.stderr
    if "GPU" in first.stderr:
        assert f"No GPU here: training {tiny_base} in 2 processes on the CPU." in first.stderr
    again = ran([*words, "trainer.max_steps=4", "resume=force"], tmp_path, **variables)
    assert again.returncode == 0, again.stderr
    assert "going on from run/checkpoint-2" in again.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()]
    rates = {entry["step"]: entry["learning_rate"] for entry in steps if "loss" in entry}
    assert rates == {1: 1e-3, 2: 5e-4, 3: 5e-4, 4: 2.5e-4}  # from 2 steps to 4: today's schedule
    assert (tmp_path / "run" / "config.yaml").read_text().count("num_processes: 2") == 1
    files = {path.name for path in (tmp_path / "run" / "checkpoint-4").iterdir()}
    assert {"zero-00001-of-00002.safetensors", "zero-00002-of-00002.safetensors", "zero.json"} <= files
    assert not any(name.startswith("zero") for name in os.listdir(tmp_path / "run" / "last"))

    export = [
        "glmtune",
        "export",
        f"model.source={tmp_path}/run/last",
        "format=official",
        "output_dir=out",
    ]
    exported = ran(export, tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert "reloaded and compared" in exported.stdout
    predict = ["glmtune", "predict", f"model.source={tmp_path}/out", "data=files", "data.layout=adgen"]
    predict += [f"data.test_file={tiny_rows['validation']}", "data.max_predict_samples=2", "output_dir=said"]
    predicted = ran([*predict, "generation.max_new_tokens=4"], tmp_path)
    assert predicted.returncode == 0, predicted.stderr


def test_script_trains(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path) -> None:
    variables = {"MODEL": str(tiny_base), "DATA": str(tiny_rows["train"]), "OUTPUT_DIR": "run"}
    words = [*SCRIPT, *STEPS, "data.layout=adgen", "trainer.max_steps=2", "trainer.report_to=[]"]
    done = ran(words, tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert f"training {tiny_base} in 2 processes on the CPU" in done.stderr or "GPU" not in done.stderr
    files = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"zero-00001-of-00002.safetensors", "zero-00002-of-00002.safetensors", "zero.json"} <= files
    assert not any(name.startswith("zero") for name in os.listdir(tmp_path / "run" / "last"))


@pytest.mark.slow
def test_one_message_from_processes_that_all_fail(tiny_base: Path, tmp_path: Path) -> None:
    words = [*SCRIPT, f"model.source={tiny_base}", "data=files", "data.train_file=/nowhere/rows.json"]
    failed = ran(words, tmp_path, OUTPUT_DIR="run")
    assert failed.returncode in (1, 2), failed.stderr
    lines = [line for line in failed.stderr.splitlines() if "/nowhere/rows.json" in line]
    assert len(lines) == 1, failed.stderr
    assert "Traceback" not in failed.stderr


def test_slurm_and_official_variables_become_settings(tmp_path: Path) -> None:
    (tmp_path / "glmtune").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    # Longer than a pipe holds: who reads a line and goes leaves a writer that is killed.
    (tmp_path / "scontrol").write_text("#!/bin/bash\nseq -f node%.0f 7 40000\n")
    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\nseq -f 'GPU %.0f: a card' 0 40000\n")
    for name in ("glmtune", "scontrol", "nvidia-smi"):
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[7-8]", "PATH": path}
    said = ran(
        [*SCRIPT, "seed=1"], tmp_path, **slurm, DEEPSPEED="my/ds.json", NUM_GPUS="8", MASTER_PORT="29501"
    )
    assert said.stderr == ""
    assert said.stdout.splitlines() == [
        *("train", "+recipe=full", "deepspeed=my/ds.json"),
        *("launch.num_processes=8", "launch.master_port=29501", "launch.master_addr=node7"),
        *("launch.num_nodes=2", "launch.node_rank=1", "seed=1"),
    ]
    said = ran(SCRIPT, tmp_path, PATH=path, HOSTFILE="hosts", LR="2e-5", DATA="adgen", MODEL="chatglm2-6b")
    assert said.stdout.splitlines() == [
        *("train", "+recipe=full", "deepspeed=zero2", "data=adgen", "model.source=chatglm2-6b"),
        *("trainer.learning_rate=2e-5", "launch.hostfile=hosts", "launch.num_nodes=1", "launch.node_rank=0"),
    ]
