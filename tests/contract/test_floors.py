"""Imports only go down: the floors of the design, enforced."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
FLOORS = {
    "glmtune": 0,
    "glmtune.errors": 0,
    "glmtune.settings": 0,
    "glmtune.messages": 0,
    "glmtune.labels": 0,
    "glmtune.files": 0,
    "glmtune.journal": 0,
    "glmtune.tuned_files": 0,
    "glmtune.memory": 0,
    "glmtune.version": 0,
    "glmtune.tables": 0,
    "glmtune.models": 1,
    "glmtune.prefix": 2,
    "glmtune.quantization": 2,
    "glmtune.data": 2,
    "glmtune.metrics": 2,
    "glmtune.tiny": 2,
    "glmtune.adapter": 2,
    "glmtune.loading": 3,
    "glmtune.training": 3,
    "glmtune.inference": 3,
    "glmtune.export": 3,
    "glmtune.planning": 4,
    "glmtune.serving": 4,
    "evaluation": 5,
    "recipes": 6,
    "glmtune.cli": 7,
    "glmtune.__main__": 8,
}
# Only these know the library named.
ONLY = {
    "hydra": ("recipes/compose.py",),
    "omegaconf": ("recipes/compose.py",),
    "deepspeed": ("glmtune/training/distributed/deepspeed_engine.py",),
    "fastapi": ("glmtune/serving/",),
    "gradio": ("glmtune/serving/",),
}


def source_files() -> list[Path]:
    return sorted(path for top in ("glmtune", "recipes", "evaluation") for path in (REPO / top).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(REPO).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    """The longest entry of FLOORS that the module belongs to."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in FLOORS and (length > 1 or name != "glmtune" or len(parts) == 1):
            return name
    raise AssertionError(f"{module} stands on no floor: add its package to FLOORS and to DESIGN")


def imported_modules(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {module_name(path) for path in source_files()}
    found: set[str] = set()
    type_only = [
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    ]
    for node in ast.walk(tree):
        if node in type_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names}
    return found


def ours(modules: set[str]) -> set[str]:
    return {name for name in modules if name.split(".")[0] in ("glmtune", "recipes", "evaluation")}


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(REPO)))
def test_imports_go_down(path: Path) -> None:
    importer = package_of(module_name(path))
    for imported in ours(imported_modules(path)):
        target = package_of(imported)
        if target in (importer, "glmtune") or FLOORS[target] == FLOORS[importer] == 0:
            continue
        assert FLOORS[target] < FLOORS[importer], (
            f"{path.relative_to(REPO)} (floor {FLOORS[importer]}) imports {imported} (floor {FLOORS[target]})"
        )


def test_recipes_do_not_import_each_other() -> None:
    for path in (REPO / "recipes").glob("*.py"):
        siblings = {name for name in ours(imported_modules(path)) if name.startswith("recipes.")}
        assert siblings <= {"recipes.compose"}, f"{path.name} imports {siblings}"


def test_no_circles() -> None:
    graph = {module_name(path): ours(imported_modules(path)) for path in source_files()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done:
            return
        for imported in graph.get(module, ()):
            visit(imported, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("library", ONLY)
def test_libraries_stay_in_their_room(library: str) -> None:
    for path in source_files():
        users = {name.split(".")[0] for name in imported_modules(path)}
        if library in users:
            place = path.relative_to(REPO).as_posix()
            assert place.startswith(ONLY[library]), f"{place} imports {library}"


def test_files_stay_short() -> None:
    for path in source_files():
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= 500, f"{path.relative_to(REPO)} has {lines} lines"
