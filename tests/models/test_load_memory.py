"""Weights go through memory once: the peak of loading stays within 1.15 times their size."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
LIMIT = 1.15

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_peak_memory_of_loading(tmp_path: Path) -> None:
    maker = importlib.util.spec_from_file_location(
        "make_checkpoint", REPO / "benchmarks" / "make_checkpoint.py"
    )
    assert maker is not None
    assert maker.loader is not None
    module = importlib.util.module_from_spec(maker)
    maker.loader.exec_module(module)
    forms = ("bin", "safetensors")
    for form in forms:
        shape = ["--layers=12", "--hidden=1024", "--ffn=2736", "--heads=8", "--kv-heads=2", "--vocab=16384"]
        files = [f"--out={tmp_path / form}", f"--format={form}", "--dtype=float16", "--shard-bytes=100000000"]
        module.write(module.parse_arguments(shape + files))
        assert len(list((tmp_path / form).glob(f"*-of-00004.{form}"))) == 4
    tiny = REPO / "tests" / "golden" / "models" / "glm4"
    command = [
        sys.executable,
        str(REPO / "benchmarks" / "load_memory.py"),
        *(str(tmp_path / form) for form in forms),
    ]
    command += ["--dtype", "float16", "bfloat16", "--warm-up", str(tiny)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    results = [json.loads(line) for line in output.splitlines()]
    assert [result["dtype"] for result in results] == 2 * ["torch.float16", "torch.bfloat16"]
    for result in results:
        assert result["weights_bytes"] > 300e6
        assert result["ratio"] <= LIMIT, result
