"""The image's recipe, as far as it can be checked without a daemon: what it copies is there, what it runs exists."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

from recipes.serve import COMMAND
from recipes.words.compose import load_settings

REPO = Path(__file__).resolve().parents[2]
LINES = (REPO / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()


def arguments(instruction: str) -> list[str]:
    return [line.partition(" ")[2] for line in LINES if line.startswith(f"{instruction} ")]


def test_copies_what_the_wheel_is_made_of() -> None:
    copied = {word for line in arguments("COPY") if "--from" not in line for word in line.split()[:-1]}
    assert [name for name in copied if not (REPO / name).exists()] == []
    wheel = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    sources = {*wheel["targets"]["wheel"]["packages"], *wheel["targets"]["wheel"]["force-include"]}
    missing = {
        name for name in sources if not any(name == each or name.startswith(f"{each}/") for each in copied)
    }
    assert missing == set()
    allowed = {
        line[1:]
        for line in (REPO / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line[:1] == "!"
    }
    assert copied == allowed


def test_runs_as_nobody_and_serves() -> None:
    assert arguments("USER") == ["10001"]
    assert json.loads(arguments("ENTRYPOINT")[0]) == ["glmtune"]
    name, *words = json.loads(arguments("CMD")[0])
    settings = load_settings(COMMAND, words)
    assert name == COMMAND.name
    assert settings.host == "0.0.0.0"
    assert [str(settings.port)] == arguments("EXPOSE")
    assert settings.model.source == "glm-tiny"
    health = arguments("HEALTHCHECK")[0]
    assert f"http://127.0.0.1:{settings.port}/health" in health


def test_python_and_torch_are_those_of_the_setup() -> None:
    setup = (REPO / "scripts" / "setup.sh").read_text(encoding="utf-8")
    torch = re.search(r"torch==[\d.]+", setup)
    assert torch
    assert f"TORCH={torch[0]}" in arguments("ARG")
