"""The notebooks of the documentation run from top to bottom, and are kept with what they gave."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.contract.test_readme import REPO
from tests.warm.start import warm_folder

# A shorter job on the same way through the code.
SMALLER = {
    "tune": {
        "trainer.max_steps=100 trainer.save_steps=100 data.max_eval_samples=16 retention.num_prompts=20": (
            "trainer.max_steps=4 trainer.save_steps=4 data.max_train_samples=64 data.max_eval_samples=4"
            " retention.num_prompts=8 retention.max_new_tokens=8"
        ),
        "max_new_tokens=80": "max_new_tokens=8",
    },
    "evaluate": {
        "benchmark.limit=10 ": "benchmark.limit=1 ",
        "trainer.max_steps=30 trainer.save_steps=10 trainer.logging_steps=2 data.max_eval_samples=16": (
            "trainer.max_steps=6 trainer.save_steps=2 trainer.logging_steps=2 data.max_train_samples=64"
            " data.max_eval_samples=4"
        ),
        "retention.num_prompts=12": "retention.num_prompts=8",
    },
}
NOTEBOOKS = sorted((REPO / "docs" / "notebooks").glob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_there_are_two() -> None:
    assert [notebook.stem for notebook in NOTEBOOKS] == ["evaluate", "tune"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_it_is_kept_with_its_outputs(notebook: Path) -> None:
    """The site shows them; nothing of the machine that made them is in there."""
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) - 1
    text = notebook.read_text(encoding="utf-8")
    assert str(REPO) not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_it_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip(
        "nbformat", reason="needs the documentation's packages: pip install -e '.[docs]'"
    )
    nbclient = pytest.importorskip(
        "nbclient", reason="needs the documentation's packages: pip install -e '.[docs]'"
    )
    pytest.importorskip("ipykernel", reason="needs the documentation's packages: pip install -e '.[docs]'")
    monkeypatch.setenv("PATH", f"{warm_folder()}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = notebook.read_text(encoding="utf-8")
    for usual, small in SMALLER[notebook.stem].items():
        assert usual in text
        text = text.replace(usual, small)
    opened = nbformat.reads(text, as_version=4)
    client = nbclient.NotebookClient(opened, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    errors = [
        output for cell in opened.cells for output in cell.get("outputs", ()) if output.output_type == "error"
    ]
    assert errors == []
    kept = [bool(cell["outputs"]) for cell in code_cells(notebook)]
    assert [bool(cell.outputs) for cell in opened.cells if cell.cell_type == "code"] == kept
    assert (tmp_path / "runs").is_dir()
