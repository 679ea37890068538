"""A compiled library is code: it is loaded only where nobody else can have put it, and only as it was compiled."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from glmtune.quantization.kernels import native
from glmtune.quantization.kernels.library_cache import cached_library
from glmtune.quantization.kernels.native import native_library
from glmtune.storage.cache_place import cache_folder

MADE_OF = bytes(range(32))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """Writes a library of twelve bytes, and counts how often it is called."""
    file = tmp_path / "my compiler; rm"
    file.write_text(
        f"#!/bin/sh\necho \"$TMPDIR $*\" >> '{tmp_path}/calls'\nfor last; do :; done\nprintf 'some library' > \"$last\"\n"
    )
    file.chmod(0o755)
    return file


def calls(tmp_path: Path) -> list[str]:
    log = tmp_path / "calls"
    return log.read_text().splitlines() if log.exists() else []


def library(compiler: Path) -> Path:
    return cached_library([str(compiler), "-O3", "$(touch pwned)"], [Path("a b.cpp")], MADE_OF)


def test_it_is_compiled_once_into_a_folder_of_the_users_alone(
    tmp_path: Path, cache: Path, compiler: Path
) -> None:
    first = library(compiler)
    assert library(compiler) == first
    assert first.read_bytes() == b"some library"
    [call] = calls(tmp_path)
    assert call.startswith(f"{cache}/"), "temporary files of the compiler stay in the cache"
    assert "-O3 $(touch pwned) a b.cpp -o" in call
    assert not Path("pwned").exists()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    assert list(cache.iterdir()) == [first]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_one_is_compiled_again(
    damage: str, tmp_path: Path, cache: Path, compiler: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = library(compiler)
    content = file.read_bytes()
    changed = {
        "flip": bytes([content[0] ^ 1]) + content[1:],
        "cut": content[:-1],
        "empty": b"",
        "other": b"\x7fELF\x02\x01\x01" + bytes(11) + b"\xb7",  # of another processor
    }
    file.write_bytes(changed[damage])
    with caplog.at_level(logging.WARNING):
        assert library(compiler).read_bytes() == b"some library"
    assert len(calls(tmp_path)) == 2
    assert "damaged or not yours alone" in caplog.text


def test_one_that_others_may_write_or_that_is_a_link_is_never_loaded(
    tmp_path: Path, cache: Path, compiler: Path
) -> None:
    file = library(compiler)
    file.chmod(0o622)
    assert not library(compiler).stat().st_mode & 0o022
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert not library(compiler).is_symlink()
    assert len(calls(tmp_path)) == 3


def test_a_library_or_folder_of_another_user_is_never_loaded(
    tmp_path: Path, cache: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = library(compiler)
    other = os.geteuid() + 4711
    if os.geteuid() == 0:
        os.chown(file, other, -1)
        assert library(compiler).stat().st_uid == 0
        assert len(calls(tmp_path)) == 2
        os.chown(cache, other, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(OSError, match=rf"others may write to {cache}, and what lies below it is code"):
        library(compiler)


def test_an_open_folder_of_the_users_is_emptied_and_closed(
    tmp_path: Path, cache: Path, compiler: Path
) -> None:
    library(compiler)
    for mode in (0o770, 0o777, 0o1777):
        cache.chmod(mode)
        library(compiler)
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert len(calls(tmp_path)) == 4
    cache.chmod(0o755)  # open for reading alone: what is there is still the user's
    library(compiler)
    assert len(calls(tmp_path)) == 4


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_above_that_others_may_write_is_refused(
    mode: int, tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    above = tmp_path / "shared"
    above.mkdir()
    above.chmod(mode)
    monkeypatch.setenv("GLMTUNE_CACHE", str(above / "mine"))
    with pytest.raises(OSError, match=rf"others may write to {above}, .*chmod go-w.*GLMTUNE_CACHE"):
        library(compiler)
    above.chmod(0o1777)  # as /tmp: nobody can replace what is another's
    library(compiler)
    (tmp_path / "link").symlink_to(above / "mine")
    monkeypatch.setenv("GLMTUNE_CACHE", str(tmp_path / "link"))
    above.chmod(mode)
    with pytest.raises(OSError, match=f"others may write to {above}"):
        library(compiler)


def test_a_compiler_that_fails_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        library(Path("/bin/false"))
    assert list(cache.iterdir()) == []


class TestThePlainPathWithOneLine:
    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
        (tmp_path / "cpuinfo").write_text("flags : avx512f avx512bw avx512vl f16c\n")
        monkeypatch.setattr(native, "CPU_INFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
        monkeypatch.delenv("GLMTUNE_CACHE", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        native_library.cache_clear()
        yield
        native_library.cache_clear()

    def _refusal(self, caplog: pytest.LogCaptureFixture) -> str:
        with caplog.at_level(logging.WARNING):
            found = {native_library().refusal for _ in range(3)}
        [record] = caplog.records
        [refusal] = found
        assert refusal in record.getMessage()
        return refusal

    def test_no_home(
        self, compiler: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def nobody() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setenv("CXX", str(compiler))
        monkeypatch.setattr(Path, "home", nobody)
        with pytest.raises(OSError, match="no home folder"):
            cache_folder()
        assert "no home folder" in self._refusal(caplog)

    def test_a_home_that_cannot_be_written(
        self, compiler: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("CXX", str(compiler))
        monkeypatch.setenv("HOME", "/proc")  # read-only for root, too
        assert "cannot be kept or loaded" in self._refusal(caplog)

    def test_what_was_compiled_is_no_library(
        self, compiler: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("CXX", str(compiler))
        monkeypatch.setenv("GLMTUNE_CACHE", str(cache))
        assert "cannot be kept or loaded" in self._refusal(caplog)
