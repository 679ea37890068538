"""Files and folders appear whole or not at all, and survive a power cut."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from glmtune import files
from glmtune.errors import GlmtuneError


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record every sync and rename, as no test can cut the power between them."""
    steps: list[tuple[str, str]] = []
    sync, rename, replace = files.sync, Path.rename, Path.replace

    def record(what: str, do):
        def recorded(path: Path, *others):
            steps.append((what, path.name))
            return do(path, *others)

        return recorded

    monkeypatch.setattr(files, "sync", record("sync", sync))
    monkeypatch.setattr(Path, "rename", record("rename", rename))
    monkeypatch.setattr(Path, "replace", record("rename", replace))
    return steps


def test_write_text_replaces_at_once(tmp_path: Path) -> None:
    files.write_text(tmp_path / "log", "one")
    files.write_text(tmp_path / "log", "two")
    assert (tmp_path / "log").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, order: list[tuple[str, str]]) -> None:
    files.write_text(tmp_path / "log", "one")
    assert order == [("sync", ".log.partial"), ("rename", ".log.partial")]


def test_a_folder_is_on_disk_before_it_has_its_name(tmp_path: Path, order: list[tuple[str, str]]) -> None:
    final = tmp_path / "checkpoint-1"
    for content in ("one", "two"):
        order.clear()
        with files.prepared_folder(final) as folder:
            (folder / "parts").mkdir()
            (folder / "parts" / "weights").write_text(content)
        renamed = order.index(("rename", ".checkpoint-1.partial"))
        assert {name for what, name in order[:renamed] if what == "sync"} == {
            ".checkpoint-1.partial", "parts", "weights",
        }  # fmt: skip
        assert order[renamed + 1 :] == [("sync", tmp_path.name)], "the name is data of the folder above"
    assert ("rename", "checkpoint-1") in order, "the folder in the way is moved aside, not deleted"
    assert (final / "parts" / "weights").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_folder_is_kept_if_its_successor_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "last"
    with files.prepared_folder(final) as folder:
        (folder / "weights").write_text("good")

    def fill_half() -> None:
        with files.prepared_folder(final) as folder:
            (folder / "weights").write_text("bad")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        fill_half()
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == ".last.partial":
            raise OSError("no space")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"), files.prepared_folder(final) as folder:
        (folder / "weights").write_text("bad")
    assert (final / "weights").read_text() == "good"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_are_as_readable_as_the_user_wants(tmp_path: Path) -> None:
    def private(path: Path) -> None:
        path.write_text("x")
        path.chmod(0o600)

    before = os.umask(0o022)
    try:
        files.write_atomically(tmp_path / "weights", private)
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o644


def test_a_result_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(GlmtuneError, match=r"results.json cannot be written .*goes on where it stopped"):
        files.write_text_atomically(tmp_path / "missing" / "results.json", "x")
