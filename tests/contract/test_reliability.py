"""Every promise in docs/reliability.md names tests, and they exist and test something."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "docs" / "reliability.md"
ROW = re.compile(r"^\| (?P<promise>[^|]+) \| (?P<tests>`tests/[^|]+) \|$", re.MULTILINE)
ROWS = [
    (row["promise"], re.findall(r"`([^`]+)`", row["tests"])) for row in ROW.finditer(PAGE.read_text("utf-8"))
]
NAMED = sorted({test for _, tests in ROWS for test in tests})


def test_every_row_of_a_table_names_tests() -> None:
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    promises = [line for line in lines if line != "| promise | held by |" and "`tests/" in line]
    tables = PAGE.read_text("utf-8").count("| promise | held by |")
    assert tables == 3
    assert len(promises) == len(ROWS) > 20
    assert all(tests for _, tests in ROWS)


@pytest.mark.parametrize("name", NAMED)
def test_it_exists_and_asserts(name: str) -> None:
    text = (REPO / name).read_text(encoding="utf-8")
    assert re.search(r"^ *(async )?def test_", text, re.MULTILINE), f"{name} has no test"
    assert "assert " in text or "pytest.raises" in text, f"{name} asserts nothing"


@pytest.mark.parametrize("folder", ["hostile", "faults"])
def test_every_test_of_faults_and_hostile_input_is_named(folder: str) -> None:
    there = {path.relative_to(REPO).as_posix() for path in (REPO / "tests" / folder).glob("test_*.py")}
    text = PAGE.read_text("utf-8")
    assert [name for name in sorted(there) if name not in text] == []


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_it_is_found(page: str) -> None:
    text = (REPO / page).read_text(encoding="utf-8")
    assert "(docs/reliability.md)" in text
    assert "(SECURITY.md)" in text
