"""Examples in docstrings run, public names exist, and no file says what only one machine knows."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import glmtune

REPO = Path(__file__).resolve().parents[2]
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(REPO).with_suffix("").parts)
    for top in ("glmtune", "recipes", "evaluation")
    for path in (REPO / top).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0


def test_public_names() -> None:
    assert sorted(glmtune.__all__) == ["PrefixEncoder", "load_model", "load_tokenizer", "render_prompt"]
    assert all(callable(getattr(glmtune, name)) for name in glmtune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_modell'"):
        _ = glmtune.load_modell


def test_every_public_name_is_documented() -> None:
    for name in glmtune.__all__:
        assert (getattr(glmtune, name).__doc__ or "").strip(), name
