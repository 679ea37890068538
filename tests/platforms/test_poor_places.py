"""Machines that lack a compiler, a home folder or the right to write beside the package: everything runs, and says so."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.platforms.conftest import REPO, Run

TUNE = ("train", "+recipe=ptuning", "data=ads", "output_dir=run", "retention=null", "trainer.max_steps=1")
TUNE += ("data.max_train_samples=8", "data.max_eval_samples=4", "model.device=cpu")
QUANTIZED = """
import logging, sys
from glmtune.loading import load_model
from glmtune.quantization.kernels.dispatch import prepare_for_inference
from glmtune.quantization.kernels import native

native._cpu_flags = lambda: native.AVX512.needs  # a processor that could have the compiled products
model = load_model("glm-tiny", quantization="int4", dtype="bfloat16", device="cpu")
print(prepare_for_inference(model))
"""
POWERS = "dac_override,-dac_read_search"
"""By which the superuser writes where nobody may: without them he is a user like others."""


def test_no_compiler(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = run(sys.executable, "-c", QUANTIZED, PATH=str(tmp_path / "bin"), CXX=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'int4pack': 36")
    assert done.stderr.splitlines() == [
        "PyTorch's products of quantized weights run in place of faster ones: no C++ compiler found (g++, c++, "
        "clang++, or CXX)"
    ]


def test_no_home(run: Run, tmp_path: Path) -> None:
    home = "/nonexistent/home"
    variables = {
        "HOME": home,
        "GLMTUNE_CACHE": None,
        "XDG_CACHE_HOME": None,
        "HF_HOME": None,
        "MPLCONFIGDIR": None,
    }
    done = run(sys.executable, "-m", "glmtune", *TUNE, **variables)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "last" / "prefix_encoder.safetensors").is_file()
    assert "Traceback" not in done.stderr


def ordinary() -> list[str]:
    """Return the words in front of a program that make the superuser one who obeys the modes of files."""
    if not hasattr(os, "geteuid"):
        pytest.skip("this system has other rights")
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv to put the superuser's powers down with")
    return ["setpriv", f"--inh-caps=-{POWERS}", f"--bounding-set=-{POWERS}"]


def test_packages_that_nobody_may_write(run: Run, tmp_path: Path) -> None:
    """As in a system's own site-packages, or an image: nothing is written beside the code, nor in a closed home."""
    words = ordinary()
    site, home = tmp_path / "site", tmp_path / "home"
    home.mkdir()
    for top in ("glmtune", "evaluation", "recipes", "configs"):
        shutil.copytree(REPO / top, site / top, ignore=shutil.ignore_patterns("__pycache__", "_packages"))
    shutil.copytree(REPO / "data" / "ads", site / "data" / "ads")
    shutil.copytree(REPO / "data" / "ceval_sample", site / "data" / "ceval_sample")
    (site / "benchmarks").mkdir()
    shutil.copy(REPO / "benchmarks" / "published.yaml", site / "benchmarks")
    closed = [*site.rglob("*"), site, home]
    for path in closed:
        path.chmod(path.stat().st_mode & ~0o222)
    before = sorted(site.rglob("*"))
    variables = {
        "HOME": str(home),
        "GLMTUNE_CACHE": None,
        "XDG_CACHE_HOME": None,
        "HF_HOME": None,
        "MPLCONFIGDIR": None,
    }
    try:
        probe = run(*words, sys.executable, "-c", "open('site/new', 'w')")
        assert "PermissionError" in probe.stderr, "the test would tell nothing"
        tuned = run(*words, sys.executable, "-m", "glmtune", *TUNE, path=str(site), **variables)
        asked = (
            "eval",
            "benchmark=ceval",
            "benchmark.limit=1",
            "quantization=int8",
            "num_threads=1",
            "output_dir=eval",
        )
        judged = run(*words, sys.executable, "-m", "glmtune", *asked, path=str(site), **variables)
    finally:
        for path in closed:
            path.chmod(path.stat().st_mode | 0o200)
    for done in (tuned, judged):
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "last" / "prefix_encoder.safetensors").is_file()
    assert (tmp_path / "eval" / "results.json").is_file()
    assert sorted(site.rglob("*")) == before
    assert list(home.iterdir()) == []
