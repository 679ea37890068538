"""Fetching from a stand-in server: checksums, broken connections, archives, refusals."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from evaluation.benchmarks.fetch import CHUNK_BYTES, fetch
from evaluation.benchmarks.further.competition_math import MATH500_ROWS
from evaluation.benchmarks.sources import Download, RemoteFile
from glmtune.cli import main
from glmtune.errors import ConfigError, DataError, GlmtuneError

CONTENT = bytes(range(256)) * 700


class Stand(ThreadingHTTPServer):
    """Serves bytes from a table, with ranges; breaks connections where told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut_after: int | None = None
        self.knows_ranges = True
        self.requests: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Stand

    def do_GET(self) -> None:
        content = self.server.files.get(self.path.lstrip("/"))
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        if content is None:
            self.send_error(404)
            return
        tag = '"' + hashlib.sha256(content).hexdigest()[:8] + '"'
        start = 0
        if asked and self.server.knows_ranges and self.headers.get("If-Range", tag) == tag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content) if self.server.cut_after is None else start + self.server.cut_after
        self.wfile.write(content[start:end])

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def server():
    with Stand() as stand:
        thread = threading.Thread(target=stand.serve_forever, daemon=True)
        thread.start()
        yield stand
        stand.shutdown()


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def one(
    server: Stand, path: str = "a/data.bin", *, sha256: str | None = None, unpack: bool = False
) -> Download:
    digest = hashlib.sha256(server.files[path]).hexdigest() if sha256 is None else sha256
    return Download(
        "mmlu", "MIT", "https://example.org", (RemoteFile(path, server.url + path, digest, unpack),), "Note."
    )


def test_a_file_is_fetched_checked_and_not_fetched_twice(server, console, tmp_path):
    server.files["a/data.bin"] = CONTENT
    files = fetch(one(server), tmp_path / "new", console)
    assert files == [tmp_path / "new" / "a" / "data.bin"]
    assert files[0].read_bytes() == CONTENT
    shown = console.file.getvalue()
    assert "licence: MIT" in shown
    assert "Note." in shown
    assert fetch(one(server), tmp_path / "new", console) == files
    assert len(server.requests) == 1
    assert [path.name for path in files[0].parent.iterdir()] == ["data.bin"]


@pytest.mark.parametrize("is_pinned", [True, False])
@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_broken_download_goes_on(server, console, tmp_path, is_pinned, knows_ranges):
    server.files["a/data.bin"] = CONTENT
    server.cut_after, server.knows_ranges = 100_000, knows_ranges
    download = one(server, sha256=None if is_pinned else "")
    with pytest.raises(DataError, match=r"could not be downloaded .*is kept: run the same command again"):
        fetch(download, tmp_path, console)
    assert (tmp_path / "a" / "data.bin.part").stat().st_size == 100_000
    assert not (tmp_path / "a" / "data.bin").exists()
    server.cut_after = None
    (path,) = fetch(download, tmp_path, console)
    assert path.read_bytes() == CONTENT
    assert server.requests[-1] == ("/a/data.bin", "bytes=100000-")


def test_a_file_that_changed_meanwhile_begins_anew(server, console, tmp_path):
    server.files["a/data.bin"] = CONTENT
    server.cut_after = 5000
    with pytest.raises(DataError):
        fetch(one(server, sha256=""), tmp_path, console)
    server.files["a/data.bin"], server.cut_after = CONTENT[::-1], None
    (path,) = fetch(one(server, sha256=""), tmp_path, console)
    assert path.read_bytes() == CONTENT[::-1]


def test_a_part_that_was_whole_already_is_taken(server, console, tmp_path):
    server.files["a/data.bin"] = CONTENT
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "data.bin.part").write_bytes(CONTENT)
    assert fetch(one(server), tmp_path, console)[0].read_bytes() == CONTENT
    (tmp_path / "b").mkdir()
    server.files["b/data.bin"] = CONTENT
    (tmp_path / "b" / "data.bin.part").write_bytes(CONTENT + b"too much")
    assert fetch(one(server, "b/data.bin"), tmp_path, console)[0].read_bytes() == CONTENT


def test_another_content_is_refused_and_deleted(server, console, tmp_path):
    server.files["a/data.bin"] = CONTENT
    with pytest.raises(DataError, match=r"has the SHA-256 [0-9a-f]{64}, but the official file has 00ff"):
        fetch(one(server, sha256="00ff"), tmp_path, console)
    assert list((tmp_path / "a").glob("data.bin*")) in ([], [tmp_path / "a" / "data.bin.part.etag"])


def test_an_absent_file_and_a_silent_server_are_said(server, console, tmp_path):
    gone = Download("mmlu", "MIT", "x", (RemoteFile("x.bin", server.url + "x.bin"),))
    with pytest.raises(DataError, match=r"x.bin could not be downloaded \(HTTP 404"):
        fetch(gone, tmp_path, console)
    silent = Download("mmlu", "MIT", "x", (RemoteFile("x.bin", "http://127.0.0.1:9/x.bin"),))
    with pytest.raises(DataError, match=r"127.0.0.1:9/x.bin could not be downloaded .*HTTPS_PROXY"):
        fetch(silent, tmp_path, console)
    (tmp_path / "file").write_text("")
    server.files["x.bin"] = b"x"
    with pytest.raises(GlmtuneError, match="cannot be written"):
        fetch(one(server, "x.bin"), tmp_path / "file", console)


def archive(kind: str, names: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            for name, content in names.items():
                file.writestr(name, content)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as file:
            link = tarfile.TarInfo("val/link")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(link)
            for name, content in names.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_are_unpacked_once(server, console, tmp_path, kind):
    server.files["data"] = archive(kind, {"dev/a.csv": b"1", "val/b.csv": b"2"})
    download = one(server, "data", sha256="", unpack=True)
    files = fetch(download, tmp_path, console)
    assert [path.relative_to(tmp_path).as_posix() for path in files] == ["dev/a.csv", "val/b.csv"]
    assert files[1].read_bytes() == b"2"
    assert not (tmp_path / "val" / "link").exists()
    assert not (tmp_path / "data").exists()
    assert fetch(download, tmp_path, console) == files
    assert len(server.requests) == 1
    files[0].unlink()
    assert fetch(download, tmp_path, console) == files
    assert files[0].read_bytes() == b"1"


@pytest.mark.parametrize("name", ["../out.csv", "/out.csv", "a/../../out.csv", "C:/out.csv"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_nothing_is_written_outside(server, console, tmp_path, kind, name):
    server.files["data"] = archive(kind, {name: b"1"})
    with pytest.raises(DataError, match="would be written outside"):
        fetch(one(server, "data", sha256="", unpack=True), tmp_path / "in", console)
    assert not list(tmp_path.rglob("out.csv"))


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_what_unpacks_beyond_measure_is_refused(server, console, tmp_path, kind, monkeypatch):
    """Member by member and in pieces: neither disk nor memory is filled by a small archive."""
    monkeypatch.setattr("evaluation.benchmarks.fetch.MAX_UNPACKED_BYTES", 300_000)
    server.files["data"] = archive(kind, {f"dev/{number}.csv": b"0" * 100_000 for number in range(9)})
    assert len(server.files["data"]) < 300_000 or kind == "zip"
    with pytest.raises(DataError, match="unpacks to more than 300000 bytes"):
        fetch(one(server, "data", sha256="", unpack=True), tmp_path, console)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.csv")) <= 300_000
    monkeypatch.setattr("evaluation.benchmarks.fetch.MAX_MEMBERS", 3)
    monkeypatch.setattr("evaluation.benchmarks.fetch.MAX_UNPACKED_BYTES", 1 << 30)
    with pytest.raises(DataError, match="3 files"):
        fetch(one(server, "data", sha256="", unpack=True), tmp_path, console)


def test_members_are_never_whole_in_memory(server, console, tmp_path, monkeypatch):
    sizes = []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(
        zipfile.ZipExtFile, "read", lambda self, size=-1: sizes.append(size) or read(self, size)
    )
    server.files["data"] = archive("zip", {"dev/a.csv": b"0" * 1_000_000})
    assert (
        fetch(one(server, "data", sha256="", unpack=True), tmp_path, console)[0].stat().st_size == 1_000_000
    )
    assert set(sizes) == {CHUNK_BYTES}


def test_a_download_that_never_ends_is_stopped(server, console, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.benchmarks.fetch.MAX_DOWNLOAD_BYTES", 100_000)
    server.files["data"] = b"0" * 300_000
    with pytest.raises(DataError, match="sends more than 100000 bytes"):
        fetch(one(server, "data", sha256=""), tmp_path, console)


@pytest.mark.parametrize("name", ["dev/a\nb.csv", "dev/\x1b[2J.csv", "dev/a\u2028b.csv"])
def test_names_of_members_are_names(server, console, tmp_path, name):
    server.files["data"] = archive("tar", {name: b"1"})
    with pytest.raises(DataError, match="is no name of a file"):
        fetch(one(server, "data", sha256="", unpack=True), tmp_path, console)


def test_a_damaged_archive_is_said(server, console, tmp_path):
    server.files["data"] = archive("tar", {"dev/a.csv": b"1" * 5000})[:60]
    with pytest.raises(DataError, match="is no whole archive"):
        fetch(one(server, "data", sha256="", unpack=True), tmp_path, console)
    assert not (tmp_path / "data").exists()


class TestCommand:
    @pytest.fixture(autouse=True)
    def _here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("GLMTUNE_DATA", raising=False)

    def test_a_benchmark_is_fetched_counted_and_found(
        self, server, benchmarks_data, monkeypatch, tmp_path, capsys
    ):
        for name in ("test.jsonl", "train.jsonl", "cot_prompt_wei2022_8shot.json"):
            server.files[name] = (benchmarks_data / "gsm8k" / name).read_bytes()
        files = tuple(RemoteFile(name, server.url + name) for name in server.files)
        table = {"gsm8k": Download("gsm8k", "MIT", "home", files)}
        monkeypatch.setattr("evaluation.benchmarks.sources.downloads", lambda: table)
        monkeypatch.setenv("COLUMNS", "200")
        assert main(["data", "fetch", "gsm8k"]) == 0
        shown = capsys.readouterr().out
        assert "licence: MIT" in shown
        assert "test: 1,319 questions" in shown
        assert "Use: glmtune eval benchmark=gsm8k" in shown
        assert (tmp_path / "data" / "gsm8k" / "test.jsonl").is_file()
        server.files["test.jsonl"] = server.files["test.jsonl"][:-300].rpartition(b"\n")[0]
        assert main(["data", "fetch", "gsm8k", "fetch_dir=elsewhere"]) == 1
        assert "must have 1319" in capsys.readouterr().err

    def test_what_scores_need_is_said_when_the_files_are_there(self, server, monkeypatch, tmp_path, capsys):
        row = {"problem": "1+1?", "solution": r"\boxed{2}", "answer": "2", "level": 1}
        names = {"algebra": "Algebra", "counting_and_probability": "Counting & Probability"}
        rows = [
            {**row, "subject": names.get(subject, subject.replace("_", " ").title())}
            for subject, count in MATH500_ROWS.items()
            for _ in range(count)
        ]
        server.files["test.jsonl"] = "".join(json.dumps(each) + "\n" for each in rows).encode()
        table = {
            "math500": Download(
                "math500", "MIT", "home", (RemoteFile("test.jsonl", server.url + "test.jsonl"),)
            )
        }
        monkeypatch.setattr("evaluation.benchmarks.sources.downloads", lambda: table)
        monkeypatch.setattr("evaluation.extraction.equality.find_spec", lambda name: None)
        monkeypatch.setenv("COLUMNS", "200")
        assert main(["data", "fetch", "math500"]) == 0
        shown = capsys.readouterr().out
        assert "test: 500 questions" in shown
        assert "pip install 'glmtune[math]'" in shown

    def test_wrong_usage_is_refused(self, capsys):
        assert main(["data", "fetch"]) == 2
        assert "`glmtune data fetch NAME`" in capsys.readouterr().err
        assert main(["data", "fetch", "mmlv"]) == 2
        assert "Did you mean `mmlu`" in capsys.readouterr().err
        assert main(["data", "check", "mmlu"]) == 2
        assert "`name` is `mmlu`, but `glmtune data check`" in capsys.readouterr().err
        assert main(["data", "fetch", "mmlu", "gsm8k"]) == 2
        assert "`gsm8k` is no override" in capsys.readouterr().err


def test_config_error_is_one(monkeypatch):
    from evaluation.benchmarks.sources import download_of

    with pytest.raises(ConfigError, match="`mmlv`"):
        download_of("mmlv")
