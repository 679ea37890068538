"""Imports only go down, and the house stays one that a newcomer finds his way in.

The floors and what is read of the code are in `scripts/architecture.py`, as the picture is drawn of the same.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from scripts.architecture import (
    FLOORS,
    PICTURE,
    REPO,
    TOPS,
    draw,
    imported_names,
    imports,
    modules,
    places,
    room_of,
)

MAX_MODULES = 14
MAX_LINES = 500
# Only these know the library named.
ONLY = {
    "hydra": ("recipes/words/compose.py", "recipes/words/values.py"),
    "omegaconf": ("recipes/words/compose.py", "recipes/words/values.py"),
    "deepspeed": ("glmtune/training/distributed/deepspeed_engine.py",),
}
# What must run where no PyTorch is installed: answers of a server are judged without a model.
WITHOUT_TORCH = (
    "evaluation.running",
    "evaluation.reporting",
    "evaluation.extraction",
    "glmtune.storage.journal",
)


def source(module: str) -> str:
    return modules()[module].relative_to(REPO).as_posix()


def test_there_is_something_to_check() -> None:
    """A reader of imports that finds none would let everything pass."""
    assert len(modules()) > 250
    assert {name.split(".")[0] for name in modules()} == set(TOPS)
    assert sum(len(imports(module)) for module in modules()) > 1000
    assert "glmtune.training.trainer" in imports("glmtune.training.rollback"), "imports for types count"
    assert "glmtune.loading" in imports("recipes.train"), "imports inside functions count"
    assert any(
        name.startswith("deepspeed")
        for name in imported_names("glmtune.training.distributed.deepspeed_engine")
    )


def test_every_name_on_a_floor_exists_once() -> None:
    assert set(places()) <= set(modules())
    names = [name for floor in FLOORS for row in floor.rows for name in row.split()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("module", modules())
def test_imports_go_down(module: str) -> None:
    room = room_of(module)
    for imported in imports(module):
        below = room_of(imported)
        if below == room or places()[below] == places()[room] == (0, 0):
            continue
        assert places()[below] < places()[room], (
            f"{source(module)} ({room}, floor and row {places()[room]}) imports {imported} ({below}, {places()[below]})"
        )


def test_recipes_do_not_import_each_other() -> None:
    for module in modules():
        # What makes settings of words is below the recipes, and they know its front only.
        if module.startswith("recipes.") and not module.startswith("recipes.words"):
            siblings = {name for name in imports(module) if name.startswith("recipes.")}
            # What runs other commands knows them; nobody knows it.
            below = {"recipes.train"} if module.startswith("recipes.flows.") else set[str]()
            assert siblings <= {"recipes.words.compose", *below}, f"{module} imports {siblings}"


def test_no_circle_of_files() -> None:
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done:
            return
        for imported in imports(module):
            visit(imported, (*trail, module))
        done.add(module)

    for module in modules():
        visit(module, ())
    assert done == set(modules())


def test_no_folder_holds_too_many_modules() -> None:
    found = Counter(path.parent for path in modules().values() if path.name != "__init__.py")
    crowded = {str(folder.relative_to(REPO)): count for folder, count in found.items() if count > MAX_MODULES}
    assert crowded == {}


@pytest.mark.parametrize("library", ONLY)
def test_libraries_stay_in_their_room(library: str) -> None:
    users = {
        source(module)
        for module in modules()
        for name in imported_names(module)
        if name.split(".")[0] == library
    }
    assert users, f"nothing imports {library}: take it out of this table"
    assert users <= set(ONLY[library])


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_runs_without_pytorch(room: str) -> None:
    pending = [module for module in modules() if module == room or module.startswith(f"{room}.")]
    seen: set[str] = set()
    while pending:
        module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        heavy = {name for name in imported_names(module) if name.split(".")[0] in ("torch", "transformers")}
        assert not heavy, f"{source(module)} imports {heavy}"
        pending += imports(module)
    assert seen


def test_files_stay_short() -> None:
    for module, path in modules().items():
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= MAX_LINES, f"{source(module)} has {lines} lines"


def test_every_package_says_what_lives_there() -> None:
    packages = [path for path in modules().values() if path.name == "__init__.py"]
    assert len(packages) > 20
    for path in packages:
        text = path.read_text(encoding="utf-8")
        assert text.startswith('"""'), path
        assert len(text) > 150 or path.parent.parent == REPO, (
            f"{path.relative_to(REPO)}: say where a reader starts"
        )


def test_the_picture_is_that_of_the_code() -> None:
    assert Path(PICTURE).read_text(encoding="utf-8") == draw(), "run `python scripts/architecture.py`"
