"""Lists, patterns, folders and archives are the rows of their files, in one order, each with its place."""

from __future__ import annotations

import gzip
import json
import logging
import tarfile
import zipfile
from pathlib import Path

import pytest

from glmtune.data.dataset import load_conversations
from glmtune.data.reading import archives
from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError, DataError


def rows(*names: str) -> str:
    return "".join(json.dumps({"prompt": name, "response": f"{name}!"}) + "\n" for name in names)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `parts` of three files in three forms, and what else lies in folders."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "c.csv").write_text("prompt,response\ne,e!\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(rows("c", "d").encode()))
    (folder / "a.jsonl").write_text(rows("a", "b"))
    (folder / ".hidden.jsonl").write_text("no")
    (folder / "README.md").write_text("no")
    with zipfile.ZipFile("parts.zip", "w") as archive:
        for name in ("c.csv", "a.jsonl", "b.jsonl.gz"):
            archive.write(folder / name, f"in/{name}")
        archive.writestr("__MACOSX/in/._a.jsonl", "no")
    return folder


def load(source: object, split: str = "train", **settings):
    return load_conversations(DataSettings(**{f"{split}_file": source, **settings}), split)


def asked(loaded) -> str:
    return "".join(item.messages[0].content for item in loaded.conversations)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("parts", "abcde"),
        ("parts/*[!d]", "abcde"),
        ("**/a.*", "ab"),
        (["parts/c.csv", "parts/a.jsonl"], "eab"),
        (["parts/b*", "parts/a.jsonl"], "cdab"),
        ("parts/b.jsonl.gz", "cd"),
        ("parts.zip/in/c.csv", "e"),
    ],
)
def test_files_are_read_in_the_order_of_their_names(source, expected: str) -> None:
    assert asked(load(source)) == expected


def test_an_archive_is_a_folder_but_for_what_is_packed_twice() -> None:
    with zipfile.ZipFile("flat.zip", "w") as archive:
        archive.write("parts/c.csv", "in/c.csv")
        archive.write("parts/a.jsonl", "in/a.jsonl")
        archive.writestr("__MACOSX/in/._a.jsonl", "no")
    loaded = load("flat.zip")
    assert (asked(loaded), loaded.path) == ("abe", "flat.zip/in/a.jsonl and 1 more file")
    assert [(item.path, item.line) for item in loaded.conversations[1:]] == [
        ("flat.zip/in/a.jsonl", 2),
        ("flat.zip/in/c.csv", 2),
    ]
    with pytest.raises(DataError, match=r"b\.jsonl\.gz.*packed by gzip"):
        load("parts.zip")


def test_the_same_rows_are_the_same_data_however_named() -> None:
    (Path("one.jsonl")).write_text(rows("a", "b", "c", "d", "e"))
    prints = {load(source).fingerprint for source in ("parts", "parts/*[!d]", "one.jsonl")}
    assert len(prints) == 1
    assert load(["parts/c.csv", "parts/a.jsonl"]).fingerprint not in prints


def test_limits_count_over_all_files() -> None:
    assert asked(load("parts", max_train_samples=3)) == "abc"
    assert asked(load("parts", max_train_samples=2)) == "ab"


def test_files_may_differ_in_layout_and_say_what_is_not_read() -> None:
    Path("parts/d.jsonl").write_text('{"instruction": "f", "output": "f!", "id": 1}\n')
    loaded = load("parts")
    assert asked(loaded) == "abcdef"
    assert loaded.layout.name == "columns and alpaca"
    assert loaded.unused_columns == ("id",)


def test_what_a_folder_holds_besides_is_said(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        load("parts")
    assert "README.md" in caplog.text
    assert "hidden" not in caplog.text


def test_every_bad_row_has_its_file() -> None:
    Path("parts/a.jsonl").write_text(rows("a") + '{"prompt": "b", "response": ""}\n')
    Path("parts/c.csv").write_text("prompt,response\ne\n")
    with pytest.raises(DataError) as caught:
        load("parts")
    words = [
        "2 of 5 rows",
        "parts/a.jsonl, line 2: `response` (the answer) is empty",
        "parts/c.csv, line 2: 1 cells",
    ]
    assert all(word in str(caught.value) for word in words), str(caught.value)
    Path("parts/a.jsonl").write_text(rows("a"))
    with pytest.raises(DataError, match=r"parts/c\.csv, line 2: 1 cells"):
        load("parts")
    Path("parts/c.csv").write_text("prompt,response\ne\nf,f!\n")
    assert asked(load("parts", on_bad_row="skip")) == "acdf"


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("parts/*.tsv", DataError, ["no file fits this pattern"]),
        ("empty", DataError, ["no data file", "It is empty", ".jsonl"]),
        ("docs", DataError, ["no data file", "note.txt"]),
        ("splits", DataError, ["several splits", "dev.json", "data.train_file=", "train.json"]),
        (["parts", "parts/a.jsonl"], ConfigError, ["parts/a.jsonl", "twice"]),
        ("parts/a.jsonl,parts/c.csv", DataError, ["data.train_file=[parts/a.jsonl,parts/c.csv]"]),
        (["parts/a.jsonl", "nowhere.jsonl"], DataError, ["nowhere.jsonl", "no such file"]),
        ("parts.zip/in/x.csv", DataError, ["no such file", "in/a.jsonl"]),
        ("tar.gz", DataError, ["tar archive", "tar xf"]),
        ("sheet.xlsx", DataError, ["CSV"]),
        ("cut.gz", DataError, ["damaged"]),
        ("fake.zip", DataError, ["no valid zip"]),
        ("rows.bz2", DataError, ["bzip2", "bunzip2"]),
        ("rows.jsonl", DataError, ["Parquet file by its content"]),
    ],
)
def test_what_cannot_be_meant_is_refused(source, error, words) -> None:
    for name in ("empty", "docs", "splits"):
        Path(name).mkdir()
    Path("docs/note.txt").write_text("x")
    for name in ("train.json", "dev.json"):
        Path("splits", name).write_text(rows("a"))
    with tarfile.open("tar.gz", "w:gz") as archive:
        archive.add("parts")
    Path("sheet.xlsx").write_bytes(Path("parts.zip").read_bytes())
    Path("cut.gz").write_bytes(Path("parts/b.jsonl.gz").read_bytes()[:-9])
    Path("fake.zip").write_text("x")
    Path("rows.bz2").write_bytes(b"BZh91AY")
    Path("rows.jsonl").write_bytes(b"PAR1xxxx")
    with pytest.raises(error) as caught:
        load(source)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("form", ["gz", "zip"])
def test_archives_are_unpacked_within_bounds(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MIN_BYTES_READ", 1 << 16)
    content = rows("a").encode() + b"\n" * (1 << 22)
    if form == "gz":
        Path("bomb.gz").write_bytes(gzip.compress(content))
    else:
        with zipfile.ZipFile("bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jsonl", content)
    with pytest.raises(DataError, match=r"bomb.*unpack to more than \d+ bytes"):
        load(f"bomb.{form}")


def test_a_file_wins_over_the_pattern_it_reads_as() -> None:
    Path("rows[1].jsonl").write_text(rows("x"))
    Path("rows1.jsonl").write_text(rows("y"))
    assert asked(load("rows[1].jsonl")) == "x"
