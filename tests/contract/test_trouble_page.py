"""docs/trouble.md: what it quotes is what glmtune prints, and the entries that messages name are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from glmtune.cli import main
from tests.contract.test_readme import REPO

PAGES = (REPO / "docs" / "trouble.md", REPO / "docs" / "trouble.zh.md")
ENTRY = re.compile(r"^### .*\{#([a-z0-9-]+)\}$", re.MULTILINE)
QUOTE = re.compile(r"^> (.*)$", re.MULTILINE)
TOPS = ("glmtune", "evaluation", "recipes")
GAP = "\0"


@cache
def sources() -> dict[Path, ast.Module]:
    return {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for top in TOPS
        for path in (REPO / top).rglob("*.py")
    }


@cache
def texts() -> str:
    """Return every text in the code, what is filled in left open."""
    found: list[str] = []
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    found += [path.read_text(encoding="utf-8") for path in (REPO / "scripts").glob("*.sh")]
    return "\n".join(found)


@cache
def named() -> dict[str, Path]:
    """Return the entries that errors name, and where."""
    found: dict[str, Path] = {}
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "see"
            ):
                found[ast.literal_eval(node.args[0])] = path
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "anchor":
                found[ast.literal_eval(node.value)] = path
    return found


def test_there_are_forty_entries_each_once_and_the_same_in_both_languages() -> None:
    english, chinese = (ENTRY.findall(page.read_text(encoding="utf-8")) for page in PAGES)
    assert english == chinese
    assert len(english) == len(set(english)) >= 40


@pytest.mark.parametrize("page", PAGES, ids=["en", "zh"])
def test_every_entry_has_a_way_out(page: Path) -> None:
    parts = re.split(r"^### ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    way = re.compile(r"\*\*Do|\*\*办法|`glmtune |`resume|`trainer\.|`data\.|`model\.|\]\(")
    assert [part.splitlines()[0] for part in parts if not way.search(part)] == []


QUOTED = sorted(set(QUOTE.findall(PAGES[0].read_text(encoding="utf-8"))))


@pytest.mark.parametrize("quote", QUOTED, ids=[f"quote{number}" for number in range(len(QUOTED))])
def test_what_is_quoted_is_printed(quote: str) -> None:
    for piece in (piece.strip() for piece in quote.split("…")):
        assert piece in texts(), piece


def test_both_pages_quote_the_same() -> None:
    english, chinese = (QUOTE.findall(page.read_text(encoding="utf-8")) for page in PAGES)
    assert english == chinese


def test_the_entries_that_errors_name_are_there() -> None:
    entries = ENTRY.findall(PAGES[0].read_text(encoding="utf-8"))
    assert len(named()) >= 10
    assert {anchor: path for anchor, path in named().items() if anchor not in entries} == {}


def test_the_command_line_shows_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "model.source=./none"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "More: docs/trouble.md#no-such-model"
    assert main(["train", "trainer.lernrate=1"]) == 2
    assert "More:" not in capsys.readouterr().err
