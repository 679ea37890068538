"""What may import what, what does, and the picture of it in ``docs/architecture.svg``.

``python scripts/architecture.py`` draws the picture anew; `tests/contract/test_floors.py` holds the code to
the floors and the picture to the code.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from html import escape
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
PICTURE = REPO / "docs" / "architecture.svg"
TOPS = ("glmtune", "evaluation", "recipes")


class Floor(NamedTuple):
    """Packages and single modules that belong together; an import goes to a lower row or floor only.

    Attributes:
        title: what the floor is, in a word.
        rows: names, the lowest row first; a package stands for all its modules that are not named themselves.
    """

    title: str
    rows: tuple[str, ...]


# The ground is the one row whose modules may import each other: they are too small to be worth an order.
FLOORS = (
    Floor(
        "ground",
        (
            "glmtune.command_line glmtune.errors glmtune.http_client glmtune.labels glmtune.listening "
            "glmtune.messages glmtune.settings glmtune.signals glmtune.storage glmtune.memory glmtune.tables "
            "glmtune.terminal glmtune.tracking glmtune.tuned_files glmtune.version",
        ),
    ),
    Floor(
        "models",
        (
            "glmtune.models.releases glmtune.models.architectures",
            "glmtune.models.settings glmtune.models.templates glmtune.models.checkpoints",
            "glmtune.switch",
            "glmtune.models.tokenizers glmtune.models.chat",
            "glmtune.models",
        ),
    ),
    Floor(
        "parts",
        (
            "glmtune.prefix glmtune.adapter glmtune.metrics glmtune.data.settings glmtune.data.records "
            "glmtune.quantization.arithmetic glmtune.tiny.corpus",
            "glmtune.data.reading glmtune.quantization.settings glmtune.quantization.layers",
            "glmtune.data glmtune.quantization.kernels glmtune.quantization.files glmtune.quantization "
            "glmtune.tiny",
            "glmtune.quantization.in_place",
        ),
    ),
    Floor(
        "runs",
        (
            "glmtune.compat.arguments",
            "glmtune.loading",
            "glmtune.compat",
            "glmtune.inference.settings glmtune.inference.perplexity glmtune.training.settings "
            "glmtune.training.log glmtune.retention.settings",
            "glmtune.inference.requests glmtune.training.adapt glmtune.training.distributed",
            "glmtune.inference.engine",
            "glmtune glmtune.inference.predict glmtune.inference glmtune.training.checkpoints "
            "glmtune.training.callbacks",
            "glmtune.training.watching glmtune.retention glmtune.preference",
            "glmtune.training glmtune.export",
            "glmtune.serving glmtune.interactive glmtune.dial glmtune.sweep",
        ),
    ),
    Floor("planning", ("glmtune.planning",)),
    Floor(
        "evaluation",
        (
            "evaluation.metrics evaluation.sample evaluation.statistics",
            "evaluation.settings evaluation.answer evaluation.backend evaluation.fewshot "
            "evaluation.extraction",
            "evaluation.task",
            "evaluation.benchmarks evaluation.backends",
            "evaluation.running",
            "evaluation.reporting",
            "evaluation.compare.settings evaluation.compare.pairing",
            "evaluation.compare.statistics",
            "evaluation.compare.reporting",
            "evaluation",
            "evaluation.compare",
        ),
    ),
    Floor("recipes", ("recipes", "recipes.flows")),
    Floor("command", ("glmtune.cli", "glmtune.__main__")),
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
def imported_names(module: str) -> frozenset[str]:
    """Return all that a module imports, modules by their own names.

    Imports inside functions and those for type checkers count: each is a thing that a reader must know first.
    """
    return frozenset(_names(modules()[module]))


def imports(module: str) -> set[str]:
    """Return the modules of ours that a module imports."""
    return {name for name in imported_names(module) if name in modules()}


def _names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            assert node.level == 0, f"{path}: relative import of {base}"
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in modules() else base


@cache
def places() -> dict[str, tuple[int, int]]:
    """Return where every name of `FLOORS` stands: the number of its floor, and of its row in it."""
    return {
        name: (number, row)
        for number, floor in enumerate(FLOORS)
        for row, names in enumerate(floor.rows)
        for name in names.split()
    }


def room_of(module: str) -> str:
    """Return the name in `FLOORS` that a module belongs to: its own, or that of the nearest package.

    Raises:
        LookupError: there is none, or the module is new beside the root: it has to be given a floor.
    """
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        # `glmtune` names its `__init__` alone: all that it holds has a floor of its own.
        if name in places() and (name == module or name != "glmtune"):
            return name
    raise LookupError(f"{module} stands on no floor: name it, or its package, in scripts/architecture.py")


def arrows() -> dict[str, set[str]]:
    """Return which rooms import which."""
    found: dict[str, set[str]] = {name: set() for name in places()}
    for module in modules():
        room = room_of(module)
        found[room] |= {room_of(name) for name in imports(module)} - {room}
    return found


# ---- the picture

WIDTH, MARGIN, TITLE = 1180, 12, 96
BOX_HEIGHT, ROW_GAP, BOX_GAP, FLOOR_GAP = 38, 20, 14, 10
COLOURS = ("#f4f1ea", "#e8f0f7", "#eaf4ea", "#fbf1e3", "#f3ebf6", "#e7f3f3", "#f7eaea", "#efefef")


def _reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leave out arrows that others imply: where A leads to B by way of C, A to B says nothing new."""

    @cache
    def reach(room: str) -> frozenset[str]:
        return frozenset().union(graph[room], *(reach(below) for below in graph[room]))

    def implied(below: str, targets: set[str]) -> bool:
        return any(below in reach(other) for other in targets if other != below)

    return {
        room: {below for below in targets if not implied(below, targets)} for room, targets in graph.items()
    }


def num_modules() -> dict[str, int]:
    """Return how many modules every room holds; a package's docstring is none."""
    return Counter(room_of(module) for module, path in modules().items() if path.name != "__init__.py")


def draw() -> str:
    """Draw the floors, highest on top, as an SVG: a box for a room, a line for imports inside a floor."""
    counts, y = num_modules(), MARGIN
    boxes: dict[str, tuple[float, float, float]] = {}
    shapes: list[str] = []
    for number, floor in reversed(list(enumerate(FLOORS))):
        rows = [[name for name in names.split() if counts[name]] for names in floor.rows]
        height = len(rows) * BOX_HEIGHT + (len(rows) - 1) * ROW_GAP + 2 * BOX_GAP
        shapes.append(
            f'<rect x="{MARGIN}" y="{y}" width="{WIDTH - 2 * MARGIN}" height="{height}" rx="6" '
            f'fill="{COLOURS[number]}"/>'
            f'<text x="{MARGIN + 10}" y="{y + 24}" class="title">{number} {escape(floor.title)}</text>'
        )
        for row, names in enumerate(rows):
            top = y + BOX_GAP + (len(rows) - 1 - row) * (BOX_HEIGHT + ROW_GAP)
            room = WIDTH - 2 * MARGIN - TITLE - BOX_GAP
            width = min(170.0, (room - BOX_GAP * (len(names) - 1)) / len(names))
            left = MARGIN + TITLE + (room - len(names) * width - (len(names) - 1) * BOX_GAP) / 2
            for place, name in enumerate(names):
                boxes[name] = (left + place * (width + BOX_GAP), top, width)
        y += height + FLOOR_GAP
    lines = [
        _line(boxes[room], boxes[below])
        for room, targets in sorted(_reduced(arrows()).items())
        for below in sorted(targets)
        # Across floors nearly everything is used by everything above: lines would hide what they show.
        if places()[below][0] == places()[room][0] > 0 and {room, below} <= boxes.keys()
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" '
            'font-family="Helvetica, Arial, sans-serif">',
            "<style>.title{font-size:13px;font-weight:bold;fill:#555}.name{font-size:11px;fill:#111}"
            ".size{font-size:9px;fill:#666}.box{fill:#fff;stroke:#888}"
            ".line{fill:none;stroke:#2b5c8a;stroke-opacity:.38}</style>",
            f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>',
            *shapes,
            *lines,
            *(_box(name, box, counts[name]) for name, box in boxes.items()),
            "</svg>\n",
        ]
    )


def _line(upper: tuple[float, float, float], lower: tuple[float, float, float]) -> str:
    x1, y1 = upper[0] + upper[2] / 2, upper[1] + BOX_HEIGHT
    x2, y2 = lower[0] + lower[2] / 2, lower[1]
    middle = (y1 + y2) / 2
    way = f"M{x1:.0f},{y1:.0f} C{x1:.0f},{middle:.0f} {x2:.0f},{middle:.0f} {x2:.0f},{y2:.0f}"
    return f'<path class="line" d="{way}"/>'


def _box(name: str, box: tuple[float, float, float], count: int) -> str:
    x, y, width = box
    shown = name.removeprefix("glmtune.").removeprefix("evaluation.")
    is_package = modules()[name].name == "__init__.py"
    size = f"{count} module{'s' if count != 1 else ''}" if is_package else "module"
    middle = f'x="{x + width / 2:.0f}" text-anchor="middle"'
    return (
        f'<rect class="box" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="4"/>'
        f'<text class="name" y="{y + 17:.0f}" {middle}>{escape(shown)}</text>'
        f'<text class="size" y="{y + 31:.0f}" {middle}>{size}</text>'
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
