"""What the engine's passes hold."""

from __future__ import annotations

from typing import Any

import pytest

from glmtune.inference.engine import engine_model


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows and tokens of every forward pass through the stack, padding included, as they happen."""
    sizes: list[tuple[int, ...]] = []
    real = engine_model.EngineModel._forward

    def spy(self: Any, states: Any, **inputs: Any) -> Any:
        sizes.append(tuple(inputs["input_ids"].shape))
        return real(self, states, **inputs)

    monkeypatch.setattr(engine_model.EngineModel, "_forward", spy)
    return sizes
