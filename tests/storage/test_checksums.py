"""Checksums: of files, of lines that stay JSON, of JSON in any layout; every flipped byte is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash

from glmtune.storage import checksums
from glmtune.storage.checksums import (
    checked_json,
    checked_line,
    file_checksum,
    json_with_checksum,
    with_checksum,
)

VALUES = {"step": 3, "loss": 2.25, "text": '她说："checksum": "x"}\u2028', "nested": {"a": [1, None]}}


def flips(data: bytes) -> list[bytes]:
    return [
        data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :] for i in range(len(data)) for bit in (1, 32, 128)
    ]


def test_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 50 + b"end"
    (tmp_path / "file").write_bytes(data)
    monkeypatch.setattr(checksums, "BUFFER_BYTES", 1000)
    assert file_checksum(tmp_path / "file") == xxhash.xxh3_128_hexdigest(data)


@pytest.mark.parametrize("values", [VALUES, {}, {"checksum": "of the user"}, {"half": "\ud83d"}])
def test_line_stays_json_and_comes_back(values: dict[str, object]) -> None:
    line = with_checksum(values)
    assert line.count("\n") == 1
    line.encode()  # valid UTF-8
    assert {**json.loads(line), "checksum": ""} == {**values, "checksum": ""}
    assert checked_line(line) == values


def test_lines_of_before_are_taken() -> None:
    assert checked_line('{"step": 1}\r\n') == {"step": 1}
    for odd in ("[1]", "{", "1", "[" * 100_000):
        with pytest.raises(ValueError, match=r"no JSON|nested|Expecting|damaged"):
            checked_line(odd)


def test_every_flip_in_a_line_is_found_or_harmless() -> None:
    line = with_checksum(VALUES).encode()
    for damaged in flips(line):
        try:
            found = checked_line(damaged.decode())
        except ValueError:
            continue
        assert {name: found.get(name) for name in VALUES} == VALUES  # only the word `checksum` was hit


def test_every_flip_in_json_is_found_or_harmless() -> None:
    text = json.dumps(json_with_checksum(VALUES), indent=2).encode()
    assert checked_json(text.decode()) == VALUES
    for damaged in flips(text):
        try:
            found = checked_json(damaged.decode())
        except ValueError:
            continue
        assert {name: found.get(name) for name in VALUES} == VALUES


def test_who_changes_a_line_is_told_how() -> None:
    changed = with_checksum({"answer": "A"}).replace('"A"', '"B"')
    with pytest.raises(ValueError, match=r"damaged.*by hand takes `checksum` out"):
        checked_line(changed)
