"""The table of models in docs/models.md: every name is known, and can be planned as the table says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from glmtune.cli import main
from glmtune.models.releases.presets import PRESETS
from glmtune.planning.geometry import read_geometry

ROOT = Path(__file__).parents[2]
PAGES = ("docs/models.md", "docs/models.zh.md")


def first_cells(page: str) -> list[str]:
    """Return the names of the table's rows, without those that speak of folders only."""
    text = (ROOT / page).read_text(encoding="utf-8")
    table = text[text.index("| `model=` |") :].split("\n\n")[0].splitlines()[2:]
    return [row.split("|")[1] for row in table]


def names(page: str) -> list[str]:
    """Return every name, where `-base` stands for the one before it with that end."""
    found: list[str] = []
    for cell in first_cells(page):
        for name in re.findall(r"`([a-z0-9.-]*-?[a-z0-9.-]*)`", cell):
            if name.startswith("-"):
                stem = next(each for each in reversed(found) if not each.endswith(("-base", "-32k", "-chat")))
                found.append(f"{stem}{name}")
            elif "-" in name:
                found.append(name)
    return found


def test_the_tables_name_the_same_models_and_all_presets() -> None:
    assert names(PAGES[0]) == names(PAGES[1])
    assert set(names(PAGES[0])) == {name for name, preset in PRESETS.items() if preset.hub_id}


@pytest.mark.parametrize("name", names(PAGES[0]))
def test_every_model_can_be_planned_in_every_way(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for way in ("+recipe=lora", "+recipe=full", "+recipe=ptuning quantization=int4"):
        assert main(["plan", f"model={name}", *way.split(), "hardware=8x80GB"]) in (0, 3), way
    assert f"{read_geometry(name).num_parameters:,} parameters" in capsys.readouterr().out


def test_the_sizes_of_those_for_laptops() -> None:
    row = next(
        row for row in (ROOT / PAGES[0]).read_text(encoding="utf-8").splitlines() if "for laptops" in row
    )
    small, large = re.search(r"([\d.]+) and ([\d.]+) billion", row).groups()  # pyright: ignore[reportOptionalMemberAccess]
    for name, told in (("glm-edge-1.5b-chat", small), ("glm-edge-4b-chat", large)):
        assert f"{read_geometry(name).num_parameters / 1e9:.1f}" == told
