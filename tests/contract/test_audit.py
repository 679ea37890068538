"""CI asks for known vulnerabilities, and never takes silence for a clean bill."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts import audit

REPO = Path(__file__).resolve().parents[2]
SILENT = {"dependencies": [{"name": "numpy", "skip_reason": "Dependency not found on PyPI"}]}
KNOWN = {"dependencies": [{"name": "numpy", "version": "2", "vulns": []}]}
WRONG = {
    "dependencies": [
        {"name": "numpy", "version": "2", "vulns": []},
        {
            "name": "pillow",
            "version": "1",
            "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2"]}],
        },
        {"name": "torch", "skip_reason": "Dependency not found on PyPI"},
    ]
}


def answers(monkeypatch: pytest.MonkeyPatch, probe: Any, everything: Any) -> list[tuple[str, ...]]:
    """Let pip-audit answer so, and return what it is asked."""
    asked: list[tuple[str, ...]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(tuple(command))
        found = probe if "--requirement" in command else everything
        return subprocess.CompletedProcess(
            command, 0, "" if found is None else json.dumps(found), "no network"
        )

    monkeypatch.setattr(audit.subprocess, "run", run)
    return asked


@pytest.mark.parametrize("probe", [SILENT, None], ids=["a mirror of packages only", "no network"])
def test_no_answer_is_said(
    probe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = answers(monkeypatch, probe, WRONG)
    assert audit.main() == 0
    said = capsys.readouterr().out
    assert said == f"not audited: no connection to {audit.SERVICE}\n"
    assert len(asked) == 1, "one package is asked about, not all"


def test_a_known_vulnerability_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, KNOWN, WRONG)
    assert audit.main() == 1
    assert capsys.readouterr().out.splitlines() == [
        "pillow 1: PYSEC-1, mended in 2",
        "torch: Dependency not found on PyPI",
        "audited 2 packages: 1 known vulnerabilities",
    ]


@pytest.mark.parametrize("name", ["PYSEC-1", "CVE-1"])
def test_an_ignored_one_is_listed_with_its_reason(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, KNOWN, WRONG)
    monkeypatch.setitem(audit.IGNORED, name, "no image of others is read")
    assert audit.main() == 0
    assert "pillow 1: PYSEC-1, mended in 2 (ignored: no image of others is read)" in capsys.readouterr().out


def test_without_pip_audit_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said = subprocess.CompletedProcess([], 1, "", "python: No module named pip_audit")
    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: said)
    with pytest.raises(SystemExit, match="pip-audit is not installed"):
        audit.main()


def test_ci_runs_it() -> None:
    assert "\n    python scripts/audit.py\n" in (REPO / "scripts" / "test.sh").read_text()
    assert all(len(reason) > 20 for reason in audit.IGNORED.values()), "every exception has a reason"
