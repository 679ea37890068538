"""Fixtures of the tests of running evaluations."""

from __future__ import annotations

import pytest

from glmtune.storage import lock


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse a second writer soon: nobody is killed here, whose end would have to be waited for."""
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.2)
