"""docs/reference.md is what the settings classes say today."""

from __future__ import annotations

from scripts.reference import PAGE, page


def test_the_reference_is_written_anew() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python scripts/reference.py`"
