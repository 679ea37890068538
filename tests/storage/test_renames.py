"""A rename that somebody's open file holds up is tried again on Windows, and nowhere else."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from glmtune.storage import files, renames


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let renames fail as on Windows while a file is open, as often as the first number says; waiting costs nothing."""
    left = [0]
    plain = {"rename": Path.rename, "replace": Path.replace}

    def refusing(name: str):
        def step(path: Path, new: Path) -> Path:
            left[0] -= 1
            if left[0] >= 0:
                raise PermissionError(13, "The process cannot access the file")
            return plain[name](path, new)

        return step

    for name in plain:
        monkeypatch.setattr(Path, name, refusing(name))
    monkeypatch.setattr(renames, "REFUSES_OPEN_FILES", True)
    return left


@pytest.mark.parametrize("step", [renames.rename, renames.replace], ids=["rename", "replace"])
def test_a_reader_is_waited_for(step, tmp_path: Path, refusals: list[int]) -> None:
    (tmp_path / "old").write_text("content")
    refusals[0] = 3
    began = time.monotonic()
    step(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new").read_text() == "content"
    assert time.monotonic() - began >= 0.01 + 0.02 + 0.04


def test_who_never_closes_it_is_reported(tmp_path: Path, refusals: list[int], monkeypatch) -> None:
    monkeypatch.setattr(renames, "PATIENCE_SECONDS", 0.1)
    (tmp_path / "old").write_text("content")
    refusals[0] = 10**9
    with pytest.raises(PermissionError, match="cannot access the file"):
        renames.rename(tmp_path / "old", tmp_path / "new")
    assert 10**9 - refusals[0] > 2, "it was tried more than once"


def test_elsewhere_it_is_reported_at_once(tmp_path: Path, refusals: list[int], monkeypatch) -> None:
    monkeypatch.setattr(renames, "REFUSES_OPEN_FILES", False)
    (tmp_path / "old").write_text("content")
    refusals[0] = 1
    with pytest.raises(PermissionError):
        renames.replace(tmp_path / "old", tmp_path / "new")
    assert refusals[0] == 0


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaced"])
def test_files_and_folders_take_their_names_so(
    replaces: bool, tmp_path: Path, refusals: list[int], monkeypatch
) -> None:
    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    for content in ("one", "two")[: 1 + replaces]:
        refusals[0] = 2
        files.write_text(tmp_path / "log", content)
        refusals[0] = 2
        with files.prepared_folder(tmp_path / "model") as folder:
            (folder / "weights").write_text(content)
    assert (tmp_path / "log").read_text() == content
    assert (tmp_path / "model" / "weights").read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "model"]
