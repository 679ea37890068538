"""What imports what: the floors of the program, and the picture of them in ``docs/architecture.svg``.

``python scripts/architecture.py`` draws the picture anew; `tests/contract/test_floors.py` holds the code to
the floors, and the picture to the code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PICTURE = REPO / "docs" / "architecture.svg"
TOPS = ("glmtune", "evaluation", "recipes")
FLOORS = (
    ("errors settings messages labels files memory version", "small shared types; whole files and folders"),
    ("models.releases", "which release is meant, where it lies"),
)


@cache
def modules() -> dict[str, Path]:
    """Return every module of the three packages by its dotted name."""
    found = {}
    for top in TOPS:
        for path in sorted((REPO / top).rglob("*.py")):
            parts = path.relative_to(REPO).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Return the modules of ours that a module imports: inside functions and for type checkers, too."""
    return frozenset(name for name in imported_names(modules()[module]) if name in modules())


def imported_names(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything a file imports; modules by their own names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in modules() else base
