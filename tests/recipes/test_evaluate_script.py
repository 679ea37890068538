"""scripts/evaluate.sh hands the official variables on, or says what is wrong with them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "evaluate.sh"


@pytest.fixture
def evaluate(tmp_path):
    """Run the script where `glmtune` only writes down what it was called with."""
    fake = tmp_path / "bin" / "glmtune"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    (tmp_path / "runs" / "ads run" / "checkpoint-30").mkdir(parents=True)

    def call(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}", **variables}
        return subprocess.run(
            ["bash", str(SCRIPT), *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return call


def test_variables_become_settings(evaluate):
    done = evaluate("model=chatglm2-6b", CHECKPOINT="ads run", STEP="30", PRE_SEQ_LEN="128", NUM_GPUS="1")
    predict, score = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert predict == (
        "predict data=adgen data.max_source_length=64 data.max_target_length=64 "
        "prefix_path=runs/ads run/checkpoint-30 output_dir=runs/ads run/predict-checkpoint-30 "
        "pre_seq_len=128 model=chatglm2-6b"
    )
    assert score == "score predictions=runs/ads run/predict-checkpoint-30/generated_predictions.jsonl"


def test_step_and_length_may_be_left_out(evaluate):
    predict = evaluate(CHECKPOINT="runs/ads run").stdout.splitlines()[0]
    assert "prefix_path=runs/ads run output_dir=runs/ads run/predict" in predict
    assert "pre_seq_len" not in predict


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NUM_GPUS": "4"}, "NUM_GPUS is 4, but prediction runs in one process"),
        ({"CHECKPOINT": "absent"}, "CHECKPOINT is absent, but there is no folder absent, runs/absent"),
        (
            {"CHECKPOINT": "ads run", "STEP": "9"},
            "STEP is 9, but there is no folder runs/ads run/checkpoint-9",
        ),
    ],
)
def test_wrong_variables_are_refused(evaluate, variables, message):
    done = evaluate(**variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
