"""Exports and quantized copies: one writer, the old or the new folder under the name, and clear words for a full disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from glmtune.errors import CheckpointError, ConfigError
from glmtune.export import export as export_run
from glmtune.export.export import MARKER, export
from glmtune.loading import load_model
from glmtune.models.checkpoints import shard_writer
from glmtune.prefix.checkpoint import export_official_prefix
from glmtune.quantization.files import write as quantize_run
from glmtune.quantization.files.write import REPORT_FILE, QuantizeJob, quantize_checkpoint
from glmtune.storage import files, lock
from tests.export.test_export import job
from tests.prefix.conftest import make_base, make_prefix
from tests.warm.start import warm_python

MARKERS = {"export": MARKER, "quantize": REPORT_FILE}
Write = Callable[..., object]


def write(command: str, source: Path, folder: Path, overwrite: bool = False) -> object:
    if command == "export":
        return export(job(source, "official", folder, overwrite=overwrite))
    return quantize_checkpoint(QuantizeJob(str(source), "int4", folder, overwrite=overwrite))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("command", MARKERS)
def test_a_folder_that_is_being_written_is_refused(
    command: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)
    with lock.lock_beside(tmp_path / "out"):
        words = rf"out is being written by another process \(process {os.getpid()} on "
        with pytest.raises(ConfigError, match=words):
            write(command, tiny_base, tmp_path / "out")
    write(command, tiny_base, tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("command", MARKERS)
@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_a_kill_while_it_is_replaced_leaves_a_model(
    way: str, command: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the old one has lost its name, the reader finds it all the same."""
    folder = tmp_path / "out"
    write(command, tiny_base, folder)

    class Killed(BaseException):
        pass

    def die(*anything: object, **options: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if way == "two renames":
            patch.setattr(files, "exchange", lambda one, other: False)
            rename = Path.rename
            patch.setattr(Path, "rename", lambda self, to: die() if to == folder else rename(self, to))
            patch.setattr(files, "put_back", lambda final: None)
        else:
            patch.setattr(Path, "rename", die)
        with pytest.raises(Killed):
            write(command, tiny_base, folder, overwrite=True)
    assert folder.exists() == (way == "exchange")
    load_model(folder)
    assert (folder / MARKERS[command]).is_file()
    write(command, tiny_base, folder, overwrite=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("command", MARKERS)
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(getattr(errno, "EDQUOT", 122), "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["ENOSPC", "EDQUOT", "safetensors"],
)
def test_a_full_disk_reads_as_one(
    error: Exception, command: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*anything: object, **options: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "save_file", full)
        with pytest.raises(
            CheckpointError,
            match=r"no room left on its disk \(.*What was there before.*Free some space.*again",
        ):
            write(command, tiny_base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()
    write(command, tiny_base, tmp_path / "out")
    assert names(tmp_path) == ["out"]


FULL_DISK = """
import json, os, resource, sys
from glmtune.cli import main
import recipes.export, recipes.quantize, glmtune.export.export, glmtune.quantization.files.write

for words, limit in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os._exit(main(words))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # not again by the next child
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows does not limit the size of files")
def test_a_disk_that_is_really_full(tiny_base: Path, tmp_path: Path) -> None:
    """Whichever library meets it: files may not grow above some hundred or thousand bytes."""
    places = [f"model.source={tiny_base}", f"output_dir={tmp_path / 'out'}"]
    cases = [
        (["quantize", "bits=4", *places], 3000),
        (["export", "format=official", *places], 3000),
        (["export", *places], 600),
    ]
    done = subprocess.run(
        [*warm_python(), "-c", FULL_DISK, json.dumps(cases)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["1", "1", "1"], done.stderr
    assert done.stderr.count("there is no room left on its disk (File too large)") == 3, done.stderr
    assert "fault of glmtune" not in done.stderr
    assert "out" not in names(tmp_path)


def test_an_output_folder_that_is_a_link_stays_one(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for overwrite in (False, True):
        write("export", tiny_base, tmp_path / "out", overwrite=overwrite)
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "out" / MARKER).is_file()
    assert names(tmp_path / "disk") == ["out"]


def test_one_prefix_is_one_file_in_the_official_form_too(tmp_path: Path) -> None:
    encoder = make_prefix(make_base(), length=6, projection=True)
    files_of = [
        export_official_prefix(encoder, tmp_path / name, config={"b": 1}) for name in ("one", "another")
    ]
    assert files_of[0].read_bytes() == files_of[1].read_bytes()
    assert names(tmp_path / "one") == ["config.json", "pytorch_model.bin"]
    assert torch.load(files_of[0], weights_only=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize("command", MARKERS)
def test_a_hangup_ends_it_in_order(
    number: int, command: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from glmtune.cli import main

    module = {"export": export_run, "quantize": quantize_run}[command]
    name = {"export": "_compare", "quantize": "_check_written"}[command]

    def stop(*anything: object, **options: object) -> None:
        assert (tmp_path / ".out.partial").is_dir()
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(module, name, stop)
    words = ["bits=4"] if command == "quantize" else []
    before = signal.getsignal(number)
    code = main([command, f"model.source={tiny_base}", f"output_dir={tmp_path / 'out'}", *words])
    assert code == 128 + number
    assert (
        f"stopped by {signal.Signals(number).name}; what was written so far is kept"
        in capsys.readouterr().err
    )
    assert [name for name in names(tmp_path) if "parts" not in name] == []
    assert signal.getsignal(number) == before
