"""Every command on every page composes into settings; pages in two languages hold the same commands."""

from __future__ import annotations

import functools
import importlib
import re
import shlex

import pytest

from glmtune.cli import COMMANDS
from glmtune.errors import ConfigError
from recipes.words.command import Command
from recipes.words.compose import load_settings
from recipes.words.reading import read_words
from tests.contract.test_readme import REPO, commands

PAGES = sorted(
    path.relative_to(REPO).as_posix()
    for path in [*REPO.glob("README*.md"), *(REPO / "docs").rglob("*.md")]
    # A diary names what there was; job files are scripts (`tests/platforms/test_pages.py`).
    if path.name not in ("log.md", "slurm_kubernetes.md")
)
CHINESE = [page for page in PAGES if page.endswith(".zh.md")]
# Programs of others, and what only changes the shell.
OTHERS = ("cd", "curl", "docker", "echo", "hf", "llama-cli", "ollama", "openssl", "pip", "source", "vllm")


def programs(line: str) -> list[list[str]]:
    """Return the words of each program that a line starts, without what the shell keeps to itself."""
    found: list[list[str]] = []
    for part in re.split(r" \| (?=\w)| && ", line):
        words = shlex.split(re.sub(r" [<>] \S+", "", part))
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        found.append(words)
    return [words for words in found if words]


@functools.cache
def check(*words: str) -> None:
    """Check the words of one program; many stand on several pages, and what is well is well there, too."""
    if "glmtune" in words and words[0] in ("python", "torchrun"):
        words = words[words.index("glmtune") :]
    if words[0] == "glmtune":
        if words[1].startswith("-"):
            assert words[1:] == ("--help",)
            return
        command: Command = importlib.import_module(COMMANDS[words[1]][0]).COMMAND
        given = [word for word in words[2:] if word not in ("--help", "--cfg")]
        reading = read_words(given, command)
        assert isinstance(load_settings(command, reading.overrides, reading.config_dir), command.schema)
    elif words[:2] == ("python", "-m") and words[2] != "venv":
        assert (REPO / words[2].replace(".", "/")).with_suffix(".py").is_file(), words
    elif words[0] in ("bash", "python") and words[1] != "-m":
        assert (REPO / words[1]).is_file(), words
    else:
        assert words[0] in (*OTHERS, "python"), f"{words[0]} is no program that these pages know"


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page) and page not in CHINESE])
def test_every_command_composes(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    for line in commands(page):
        for words in programs(line):
            try:
                check(*words)
            except Exception as error:
                raise AssertionError(f"{page}: {line}\n{error}") from error


@pytest.mark.parametrize("page", CHINESE)
def test_both_languages_hold_the_same_commands(page: str) -> None:
    assert commands(page) == commands(page.replace(".zh.md", ".md"))


def test_a_wrong_command_is_noticed() -> None:
    wrong = {
        "glmtune train trainer.lernrate=1": ConfigError,
        "glmtune trian": KeyError,
        "bash scripts/none.sh": AssertionError,
        "rm -r runs": AssertionError,
    }
    for line, error in wrong.items():
        with pytest.raises(error):
            check(*programs(line)[0])


def test_lines_are_taken_apart() -> None:
    assert programs("echo 你好 | glmtune chat") == [["echo", "你好"], ["glmtune", "chat"]]
    assert programs("A=1 glmtune chat < in.txt > out.txt") == [["glmtune", "chat"]]


def test_there_are_pages_in_both_languages() -> None:
    assert len(CHINESE) >= 20
    assert all((REPO / page.replace(".zh.md", ".md")).is_file() for page in CHINESE)
