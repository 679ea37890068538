"""Every command of docs/export.md runs, and its examples; what needs another program is only looked at."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.export import FORMATS
from tests.contract.test_readme import REPO, SMALL, commands
from tests.warm.start import warm_python

PAGE = REPO / "docs" / "export.md"
OTHERS = ("pip ", "cd ", "ollama ", "llama-cli ")
"""First words of commands that are not ours."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's commands run one after the other, with the LoRA that they name."""
    pytest.importorskip("gguf", reason="the `gguf` package is not installed: pip install 'glmtune[gguf]'")
    folder = tmp_path_factory.mktemp("exports")
    run(["glmtune", "train", "+recipe=lora", "output_dir=runs/lora", *SMALL["train"]], folder)
    return folder


def run(words: list[str], folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [*warm_python(), "-m", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_the_table_names_every_format() -> None:
    named = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(named[: len(FORMATS)]) == sorted(FORMATS)


@pytest.mark.parametrize("line", [line for line in commands("docs/export.md") if not line.startswith(OTHERS)])
def test_command_runs(line: str, workplace: Path) -> None:
    written = run(shlex.split(line), workplace)
    assert "reloaded and compared" in written
    assert "next: llama-cli -m exports/" in written


def test_files_that_other_programs_are_given_are_there(workplace: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    files = set(re.findall(r"exports/[\w-]+/[\w-]+\.gguf", text))
    assert files
    assert all((workplace / file).is_file() for file in files)
    assert (workplace / "exports" / "glm-tiny-gguf" / "Modelfile").is_file()


def test_the_example_in_python_answers(workplace: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it compiles llama.cpp")
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=workplace, capture_output=True, text=True, check=True
    )
    assert len(done.stdout.strip()) > 3
