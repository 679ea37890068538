"""`scripts/test.sh` ends well only if everything did, and shows what failed, though types are checked beside the tests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPO, SLOWEST

PROGRAMS = ("ruff", "basedpyright", "python")
SAYS = """#!/bin/sh
echo "$(basename "$0") $*"
case "$(basename "$0") $*" in
    *"$FAILS"*) exit "$CODE" ;;
esac
"""


@pytest.mark.parametrize(
    ("fails", "code"),
    [("nothing at all", 0), ("ruff format", 1), ("ruff check", 1), ("basedpyright", 1), ("audit.py", 3), ("pytest", 5)],
)  # fmt: skip
def test_it_fails_where_a_part_fails(fails: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in PROGRAMS:
        (tmp_path / "bin" / name).write_text(SAYS)
        (tmp_path / "bin" / name).chmod(0o755)
    variables = {"SKIP_SETUP": "1", "VIRTUAL_ENV": str(tmp_path), "FAILS": fails, "CODE": str(code)}
    done = subprocess.run(
        ["bash", "scripts/test.sh", "-k", "WORD"],
        cwd=REPO,
        env={**os.environ, **variables, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    parts = [
        "ruff format --check .",
        "ruff check .",
        "python -m pytest",
        "basedpyright",
        "python scripts/audit.py",
    ]
    reached = {"ruff format": 1, "ruff check": 2, "basedpyright": 4}.get(fails, 5)
    lines = done.stdout.splitlines()
    assert [next(part for part in parts if line.startswith(part)) for line in lines] == parts[:reached]
    assert reached < 3 or lines[2].endswith(" -k WORD")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"], "nothing is left behind"


def test_the_slowest_files_are_there_and_named_once() -> None:
    assert [name for name in SLOWEST if not (REPO / "tests" / name).is_file()] == []
    assert len(set(SLOWEST)) == len(SLOWEST)
