"""Small files in the official layouts, with the real sizes replaced by a description of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def describe(tmp_path: Path) -> Callable[..., Path]:
    """Write files and a `sample_set.json`; returns the folder."""

    def write(files: dict[str, str], rows: dict[str, dict[str, int]] | None = None) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode("utf-8"))
        if rows is not None:
            (tmp_path / "sample_set.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
        return tmp_path

    return write
