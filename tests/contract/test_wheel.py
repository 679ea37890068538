"""The built wheel: right names inside, and every command finds its configs and data from it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(REPO)], check=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content alone; put first on the path it hides the checkout."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(installed: Path, *command: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_top_level_names(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    packages = {name for name in names if not name.endswith(".dist-info")}
    # `evaluation` and `recipes` are other people's names, too: pip would let one distribution overwrite another's.
    assert packages == {"glmtune", "glmtune-packages.pth"}
    assert (REPO / "scripts" / "glmtune-packages.pth").read_text() == "glmtune/_packages\n"


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "_configs/train.yaml",
        "_configs/recipe/ptuning.yaml",
        "_data/ads/train.jsonl",
        "_data/preference/train.jsonl",
        "_data/retain/prompts.jsonl",
        "_data/retention/prompts.jsonl",
        "_data/exam/exam.jsonl",
        "_data/ceval_sample/val/high_school_biology_val.csv",
        "_data/bbh_sample/cot-prompts/navigate.txt",
        "_configs/chat.yaml",
        "_configs/serve.yaml",
        "_configs/web.yaml",
        "serving/service/page.html",
        "interactive/web/page.css",
        "py.typed",
    ):
        assert f"glmtune/{needed}" in names
    for needed in (
        "benchmarks/ceval.yaml",
        "benchmarks/mmlu.yaml",
        "benchmarks/bbh.yaml",
        "benchmarks/cmmlu.yaml",
        "benchmarks/downloads.yaml",
    ):
        assert f"glmtune/_packages/evaluation/{needed}" in names
    samples = {"ceval_sample", "mmlu_sample", "gsm8k_sample", "gsm8k_zh_sample", "bbh_sample"}
    samples |= {"cmmlu_sample", "mmlu_pro_sample", "gsm_symbolic_sample", "math500_sample", "ifeval_sample"}
    samples |= {"longbench_sample"}
    ours = {"ads", "chat", "preference", "retain", "retention", "exam"} | samples
    shipped = {name.split("/")[2] for name in names if name.startswith("glmtune/_data/")}
    assert shipped == ours, "data of others, fetched into ./data, must never be built into a wheel"
    assert any(name.startswith("glmtune/assets/glm-tiny/") for name in names)


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 16 * 2**20


def test_packages_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    probe = (
        "import os, site, sys\n"
        "ours = ('glmtune/__init__.py', 'evaluation/__init__.py')\n"
        "sys.path = [p for p in sys.path if not any(os.path.isfile(os.path.join(p, name)) for name in ours)]\n"
        "site.addsitedir(sys.argv[1])\n"
        "import glmtune, recipes, evaluation; print(glmtune.__file__, recipes.__file__, evaluation.__file__)"
    )
    for place in run(installed, "-c", probe, str(installed), cwd=tmp_path).split():
        assert Path(place).is_relative_to(installed)


@pytest.mark.parametrize("command", ["chat", "serve", "web"])
def test_what_talks_explains_itself(command: str, installed: Path, tmp_path: Path) -> None:
    said = run(installed, "-m", "glmtune", command, "--help", cwd=tmp_path)
    assert said.startswith(f"usage: glmtune {command}")
    # Composed from the wheel's own configs.
    assert "engine:" in run(installed, "-m", "glmtune", command, "--cfg", cwd=tmp_path)


def test_pages_are_read_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    probe = (
        "from importlib.resources import files\n"
        "for package, name in (('glmtune.serving.service', 'page.html'), ('glmtune.interactive.web', 'page.css')):\n"
        "    file = files(package).joinpath(name)\n"
        "    assert file.read_text(encoding='utf-8').strip(); print(file)"
    )
    for place in run(installed, "-c", probe, cwd=tmp_path).split():
        assert Path(place).is_relative_to(installed)


def test_trains_on_shipped_data(installed: Path, tmp_path: Path) -> None:
    overrides = [
        "retention.num_prompts=4",
        "trainer.max_steps=1",
        "data.max_train_samples=16",
        "data.max_eval_samples=8",
        "output_dir=run",
    ]
    run(installed, "-m", "glmtune", "train", "+recipe=ptuning", *overrides, cwd=tmp_path)
    assert (tmp_path / "run" / "last" / "prefix_encoder.safetensors").is_file()


def test_package_runs_from_an_editable_install_elsewhere(tmp_path: Path) -> None:
    probe = [sys.executable, "-m", "glmtune", "train", "+recipe=ptuning", "--cfg"]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(probe, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "pre_seq_len" in done.stdout
