"""Files and folders appear whole or not at all, and survive a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path

import pytest

from glmtune.errors import GlmtuneError
from glmtune.storage import files


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
    assert order == [("sync", ".log.partial"), ("rename", ".log.partial"), ("sync", tmp_path.name)]


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a folder takes the place of another one: in one step, or where there is no such step."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    elif sys.platform not in ("linux", "darwin"):
        pytest.skip("this system lets no two names change places")
    return request.param


def test_a_folder_is_on_disk_before_it_has_its_name(
    tmp_path: Path, order: list[tuple[str, str]], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "exchange":
        swap = files.exchange
        monkeypatch.setattr(
            files, "exchange", lambda one, other: (order.append(("rename", one.name)), swap(one, other))[1]
        )
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
        assert ("sync", tmp_path.name) in order[renamed + 1 :], "the name is data of the folder above"
        assert order[-1] == ("sync", tmp_path.name)
    if way == "two renames":
        assert ("rename", "checkpoint-1") in order, "the folder in the way is moved aside, not deleted"
    assert (final / "parts" / "weights").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("moment", range(12))
def test_a_kill_at_any_step_leaves_the_old_or_the_new(
    moment: int, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two changes of names or contents; where two renames are needed, `put_back` decides."""
    final = tmp_path / "model"
    with files.prepared_folder(final) as folder:
        (folder / "weights").write_text("old")

    class Killed(BaseException):
        pass

    steps: list[str] = []

    def counted(do):
        def step(*arguments, **options):
            steps.append("")
            if len(steps) > moment:
                raise Killed  # nothing runs after a kill: every later step fails, too
            return do(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(files, "exchange", counted(files.exchange))
        patch.setattr(files.shutil, "rmtree", counted(files.shutil.rmtree))
        patch.setattr(files, "sync", counted(files.sync))
        with contextlib.suppress(Killed), files.prepared_folder(final) as folder:
            (folder / "weights").write_text("new")
    if way == "exchange":
        assert final.is_dir(), "never neither"
    files.put_back(final)
    assert (final / "weights").read_text() in ("old", "new")
    with files.prepared_folder(final) as folder:
        (folder / "weights").write_text("third")
    assert (final / "weights").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_reader_that_puts_the_old_one_back_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    final, rename, met = tmp_path / "model", Path.rename, []

    def meanwhile(path: Path, target: Path) -> Path:
        if path.name == ".model.partial" and not met and final not in tmp_path.iterdir():
            met.append(1)
            if files.replaced_of(final).exists():
                files.put_back(final)
        return rename(path, target)

    for content in ("old", "new"):
        met.clear()
        monkeypatch.setattr(Path, "rename", meanwhile)
        with files.prepared_folder(final) as folder:
            (folder / "weights").write_text(content)
    assert met
    assert (final / "weights").read_text() == "new"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })', errno.ENOSPC),
        ("Disk quota exceeded (os error 122)", 122),
        ("Input/output error (os error 5)", errno.EIO),
    ],
)
def test_a_full_disk_is_one_whoever_says_so(text: str, code: int, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError(text)

    with pytest.raises(OSError, match=r".") as caught:
        files.write_atomically(tmp_path / "weights", fail)
    assert caught.value.errno == code
    assert list(tmp_path.iterdir()) == []
    said = str(files.folder_error(tmp_path, caught.value))
    assert ("there is no room left on its disk" in said) == (code != errno.EIO), said
    with pytest.raises(RuntimeError, match="shapes differ"):
        files.write_atomically(
            tmp_path / "weights", lambda path: (_ for _ in ()).throw(RuntimeError("shapes differ"))
        )


def test_a_folder_is_kept_if_its_successor_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "exchange", lambda one, other: False)
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
