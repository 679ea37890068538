"""What the engine's passes hold."""

from __future__ import annotations

from typing import Any

import pytest

from glmtune.inference.engine.model import EngineModel


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows and tokens of every forward pass through the stack, padding included, as they happen."""
    sizes: list[tuple[int, ...]] = []
    real = EngineModel._forward

    def spy(self: Any, states: Any, **inputs: Any) -> Any:
        sizes.append(tuple(inputs["input_ids"].shape))
        return real(self, states, **inputs)

    monkeypatch.setattr(EngineModel, "_forward", spy)
    return sizes
