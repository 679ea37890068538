"""Write docs/reference.md: every command with all its settings, from the classes that `--help` reads.

python scripts/reference.py          # a test compares the page with what this would write
"""

from __future__ import annotations

import importlib
from pathlib import Path

from glmtune.cli import COMMANDS
from recipes.train import TrainConfig
from recipes.words.compose import Command, config_groups, setting_rows

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
INTRODUCTION = """# Every command and setting

Written by `scripts/reference.py` from the settings classes, as `glmtune COMMAND --help` is.
[settings.md](settings.md) says how they are written, and which names of other tools are read.
"""


def page() -> str:
    """Return the page."""
    commands = [importlib.import_module(module).COMMAND for module, _ in COMMANDS.values()]
    contents = "\n".join(
        f"- [`glmtune {each.name}`](#glmtune-{each.name}): {each.summary}" for each in commands
    )
    return "\n".join([INTRODUCTION, contents, "", *map(section, commands)])


def section(command: Command) -> str:
    """Return what the page says of one command."""
    rows = list(setting_rows(command.schema))
    roots = {path.split(".")[0] for path, _, _ in rows}
    groups = {name: found for name, found in config_groups().items() if name in roots}
    if command.name == "train":
        groups["+recipe"] = config_groups()["recipe"]
    lines = [
        f"## glmtune {command.name}",
        "",
        f"{command.summary[:1].upper()}{command.summary[1:].rstrip('.')}.",
    ]
    if command.examples:
        lines += ["", "```bash", *command.examples, "```"]
    if groups:
        lines += [
            "",
            *(f"- `{name}=` {', '.join(f'`{each}`' for each in found)}" for name, found in groups.items()),
        ]
    training = {path for path, _, _ in setting_rows(TrainConfig)} if command.name != "train" else set()
    paths = {path for path, _, _ in rows}
    if len(training & paths) > len(training) / 2:  # which takes a run's settings, too
        rows = [row for row in rows if row[0] not in training]
        absent = ", ".join(f"`{path}`" for path in sorted(training - paths))
        but = f", but for {absent}" if absent else ""
        lines += ["", f"The settings of [`glmtune train`](#glmtune-train){but}{', and:' if rows else '.'}"]
    lines += ["", "| setting | default | meaning |", "|---|---|---|"] if rows else []
    lines += [
        f"| `{path}` | {cell(default)} | {text.replace('|', chr(92) + '|')} |" for path, default, text in rows
    ]
    return "\n".join([*lines, ""])


def cell(default: object) -> str:
    """Return a default as a table shows it."""
    text = "" if default is None else str(default)
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
