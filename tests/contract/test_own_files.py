"""Files of the user's, and packages of other people, that are called as ours or as a library is."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SHADOWS = ("evaluation.py", "recipes/__init__.py", "datasets.py", "tokenizers.py", "peft/__init__.py")
SPOILED = "raise SystemExit('a file of the user was imported')\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder whose files are called as modules that glmtune imports."""
    for name in SHADOWS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(SPOILED)
    return tmp_path


def run(*words: str | Path, cwd: Path, path: str = "") -> str:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path or os.environ.get("PYTHONPATH", ""),
    }
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("command", ["eval", "train"])
def test_python_m(folder: Path, command: str) -> None:
    assert f"usage: glmtune {command}" in run(sys.executable, "-m", "glmtune", command, "--help", cwd=folder)


def test_the_script(folder: Path) -> None:
    script = Path(sys.executable).with_name("glmtune")
    assert "usage: glmtune eval" in run(script, "eval", "--help", cwd=folder)


def test_torchrun(folder: Path) -> None:
    torchrun = Path(sys.executable).with_name("torchrun")
    words = ("--standalone", "--nnodes=1", "--nproc-per-node=2", "-m", "glmtune", "eval", "--help")
    assert run(torchrun, *words, cwd=folder).count("usage: glmtune eval") == 2


def test_processes_of_the_launcher(folder: Path) -> None:
    # `python -m glmtune` would run it; the script and its children do not.
    (folder / "glmtune.py").write_text(SPOILED)
    script = Path(sys.executable).with_name("glmtune")
    small = (
        "retention.num_prompts=4",
        "trainer.max_steps=1",
        "data.max_train_samples=8",
        "data.max_eval_samples=4",
    )
    run(script, "train", "+recipe=ptuning", "launch.num_processes=2", *small, "output_dir=run", cwd=folder)
    assert (folder / "run" / "last" / "prefix_encoder.safetensors").is_file()


def test_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    probe = "import sys; sys.path = [p for p in sys.path if p != sys.argv[1]]; sys.argv = sys.argv[2:]\n"
    probe += "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    program = REPO / "glmtune" / "__main__.py"
    shown = run(sys.executable, "-P", "-c", probe, REPO, program, "eval", "--help", cwd=tmp_path)
    assert "usage: glmtune eval" in shown


@pytest.mark.parametrize("order", ["theirs first", "ours first"])
def test_another_distribution_of_that_name(tmp_path: Path, order: str) -> None:
    """Both are installed into one folder; neither loses a file, and the command finds its own."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(REPO)], check=True, timeout=300)
    site, theirs = tmp_path / "site", {"evaluation/__init__.py": SPOILED, "recipes/train.py": SPOILED}

    def install_theirs() -> None:
        for name, text in theirs.items():
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_text(text)

    if order == "theirs first":
        install_theirs()
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(site)
    if order == "ours first":
        install_theirs()
    assert {name: (site / name).read_text() for name in theirs} == theirs
    shown = run(sys.executable, "-m", "glmtune", "eval", "--help", cwd=tmp_path, path=str(site))
    assert "usage: glmtune eval" in shown
    settings = run(
        sys.executable, "-m", "glmtune", "train", "+recipe=ptuning", "--cfg", cwd=tmp_path, path=str(site)
    )
    assert "pre_seq_len" in settings
