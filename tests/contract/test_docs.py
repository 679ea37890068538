"""Examples in docstrings run, public names exist, and no file says what only one machine knows."""

from __future__ import annotations

import doctest
import importlib
import re
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
    assert sorted(glmtune.__all__) == [
        "ChatEngine",
        "Engine",
        "PrefixEncoder",
        "load_model",
        "load_model_on_gpus",
        "load_tokenizer",
        "pipeline",
        "render_prompt",
    ]
    assert all(callable(getattr(glmtune, name)) for name in glmtune.__all__)
    assert dir(glmtune) == sorted([*glmtune.__all__, "__version__"])
    with pytest.raises(AttributeError, match="no attribute 'load_modell'"):
        _ = glmtune.load_modell


def test_every_public_name_is_documented() -> None:
    for name in glmtune.__all__:
        assert (getattr(glmtune, name).__doc__ or "").strip(), name


PAGES = sorted(
    path
    for path in [*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md"), *(REPO / "data").rglob("README.md")]
    if path.name != "log.md"  # a diary: it names what there was
)
TOPS = "glmtune|evaluation|recipes|configs|scripts|tests|benchmarks|docs|data"
PATH = re.compile(rf"(?<![\w./-])(?:{TOPS})/[\w./*-]*[\w*]")
MODULE = re.compile(r"(?<![\w./-])(?:glmtune|evaluation|recipes)(?:\.[a-z_]\w*)+")
PLACEHOLDER = re.compile(r"\bNAME\b|/mine\b")
ABSENT_HERE = (
    "glmtune/_packages",
    "configs/local",
    "data/mmlu",
    "data/ceval",
    "data/gsm8k",
    "data/bbh",
    "docs/verdict/",
)


def test_there_are_pages() -> None:
    assert len(PAGES) > 10
    assert any(PATH.search(page.read_text(encoding="utf-8")) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_pages_name_paths_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {name for name in PATH.findall(text) if not PLACEHOLDER.search(name)}
    absent = [
        name for name in named if not name.startswith(ABSENT_HERE) and not any(REPO.glob(name.rstrip("/")))
    ]
    assert absent == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_pages_name_modules_that_exist(page: Path) -> None:
    named = set(MODULE.findall(page.read_text(encoding="utf-8")))
    assert [name for name in named if not (REPO / name).is_file() and not is_importable(name)] == []


def is_importable(name: str) -> bool:
    """Whether a dotted name is a module of ours, or something in one."""
    parts = name.split(".")
    lengths = [
        n
        for n in range(len(parts), 0, -1)
        if (place := REPO.joinpath(*parts[:n])).is_dir() or place.with_suffix(".py").is_file()
    ]
    found: object = importlib.import_module(".".join(parts[: lengths[0]]))
    for part in parts[lengths[0] :]:
        found = getattr(found, part, None)
    return found is not None


def test_names_that_do_not_exist_are_noticed() -> None:
    assert is_importable("glmtune.models.load.load_official")
    assert not is_importable("glmtune.models.load.load_base")
    assert not is_importable("glmtune.models.nowhere")
