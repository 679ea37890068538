"""Every example of docs/python.md runs, and its table names what exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import glmtune

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_every_public_name_is_on_the_page() -> None:
    absent = {name for name in glmtune.__all__ if name not in PAGE}
    assert absent == {"PrefixEncoder"}  # for those who build on the parts


def test_examples_run_without_a_warning(tmp_path: Path) -> None:
    """One after the other in one process, each with names of its own."""
    code = "\n".join(f"exec({example!r}, {{}})" for example in EXAMPLES)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code.replace("runs/mine", "none/here")],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    assert "'role': 'assistant'" in done.stdout


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6
