"""LoRA from the command line: train glm-tiny, answer with the adapter, merge it, answer the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmtune.cli import main


def answers(folder: Path) -> list[str]:
    lines = (folder / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def test_train_predict_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, merged = tmp_path / "lora", tmp_path / "merged"
    small = [
        "retention=null",
        "trainer.max_steps=6",
        "data.max_train_samples=32",
        "trainer.per_device_train_batch_size=8",
    ]
    small += ["trainer.save_steps=6", "trainer.warmup_steps=0", "trainer.learning_rate=5e-3"]
    assert main(["train", "+recipe=lora", *small, f"output_dir={run}"]) == 0
    few = ["data.max_predict_samples=4", "generation.max_new_tokens=12", "model.dtype=float32"]
    assert main(["predict", f"adapter_path={run}", "compare_base=true", *few]) == 0
    assert answers(run / "predict") != answers(run / "predict" / "base")
    export = ["export", f"adapter_path={run}", "format=official", "dtype=float32", f"output_dir={merged}"]
    assert main(export) == 0
    assert "reloaded and compared: logits differ by at most" in capsys.readouterr().out
    assert main(["predict", f"model.source={merged}", *few, f"output_dir={tmp_path / 'again'}"]) == 0
    assert answers(tmp_path / "again") == answers(run / "predict")
    assert main(export) == 2
    assert "overwrite=true" in capsys.readouterr().err
