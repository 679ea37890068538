"""There is one way out to a terminal, `glmtune.terminal`: elsewhere nobody prints, nor makes a console."""

from __future__ import annotations

import ast

import pytest

from scripts.architecture import REPO, modules

ROOM = "glmtune.terminal"
STREAMS = {"stdout", "stderr", "__stdout__", "__stderr__"}
# Classes and functions of rich that read markup, or write past our console.
RICH = {
    "rich.console": {"Console"},
    "rich.progress": {"Progress", "track"},
    "rich.live": {"Live"},
    "rich": {"print", "get_console", "print_json", "inspect"},
}


def offences(source: str) -> list[str]:
    """Return what in a module goes to a terminal by another way."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"line {node.lineno}: print")
        elif isinstance(node, ast.Attribute) and node.attr in ("from_markup", "from_ansi"):
            found.append(f"line {node.lineno}: {node.attr}")
        elif isinstance(node, ast.Attribute) and node.attr in STREAMS and ast.unparse(node.value) == "sys":
            found.append(f"line {node.lineno}: sys.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module in RICH:
            names = {alias.name for alias in node.names} & RICH[node.module]
            found += [f"line {node.lineno}: {node.module}.{name}" for name in sorted(names)]
        elif isinstance(node, ast.keyword) and node.arg == "markup" and ast.unparse(node.value) == "True":
            found.append(f"line {node.value.lineno}: markup=True")
    return found


@pytest.mark.parametrize("module", [name for name in modules() if not name.startswith(ROOM)])
def test_nobody_prints_by_another_way(module: str) -> None:
    path = modules()[module]
    assert offences(path.read_text(encoding="utf-8")) == [], path.relative_to(REPO)


@pytest.mark.parametrize(
    "line",
    [
        "print('x')",
        "import sys; sys.stderr.write(text)",
        "from rich.console import Console",
        "from rich.progress import BarColumn, track",
        "Text.from_markup(text)",
        "console.print(text, markup=True)",
    ],
)
def test_another_way_would_be_noticed(line: str) -> None:
    assert offences(line)
