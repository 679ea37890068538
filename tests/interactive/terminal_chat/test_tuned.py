"""`glmtune chat` with what was really tuned, with tools, and over a real `glmtune serve`, in a pseudo-terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interactive.conftest import KEY
from tests.interactive.pseudo_terminal import Terminal, chat
from tests.interactive.tuned import Tuned
from tests.serving.service.served import Served, serve
from tests.warm.start import warm_python

READY = r"\n> ?$"
QUESTION = "Hello, who are you?"
GREEDY = ("temperature=0", "max_new_tokens=16")
LATE = ("HOME", "PROMPT_TOOLKIT_NO_CPR")
"""Variables of a terminal here, which nothing reads that was imported."""
END = r"\[\d+ tokens[^\]]*\]"


def answer_to(terminal: Terminal, question: str = QUESTION) -> str:
    """Begin anew, ask, and return the answer."""
    terminal.type("clear\r")
    terminal.until("begins anew")
    terminal.until(READY)
    terminal.type(f"{question}\r")
    lines = terminal.until(END).splitlines()
    terminal.until(READY)
    return "\n".join(lines[1:-1])


def say(terminal: Terminal, line: str) -> str:
    """Type a command and return what is said to it."""
    terminal.type(f"{line}\r")
    return terminal.until(READY)


def with_each(terminal: Terminal) -> dict[str, str]:
    """Ask the same with the prefix that the talk begins with, without it, with the LoRA, and with the base."""
    answers = {"prefix": answer_to(terminal)}
    assert "strength: 0" in say(terminal, "/strength 0")
    answers["strength 0"] = answer_to(terminal)
    assert "adapter: low" in say(terminal, "/adapter low")
    answers["lora"] = answer_to(terminal)
    assert "strength: 0" in say(terminal, "/strength 0")
    answers["scale 0"] = answer_to(terminal)
    assert "adapter: none, the base" in say(terminal, "/adapter base")
    answers["base"] = answer_to(terminal)
    return answers


def assert_each_is_its_own(answers: dict[str, str]) -> None:
    assert answers["base"].startswith("I am glm-tiny")
    assert answers["strength 0"] == answers["scale 0"] == answers["base"]
    assert len({answers["prefix"], answers["lora"], answers["base"]}) == 3, answers


def test_a_prefix_its_strength_and_a_lora(tuned: Tuned, tmp_path: Path) -> None:
    words = (f"prefix_path={tuned.prefix}", f"adapter_path={tuned.lora}")
    with Terminal(chat(*words, *GREEDY, python=warm_python(*LATE)), home=tmp_path) as terminal:
        assert "adapter ads" in terminal.until(READY)
        assert "ads (prefix), low (lora)" in say(terminal, "/adapter")
        assert_each_is_its_own(with_each(terminal))
        terminal.type("stop\r")
        assert terminal.end() == 0


def test_the_same_of_a_server(tuned_server: Served, tmp_path: Path) -> None:
    words = (f"url={tuned_server.url}", "url_model=ads", *GREEDY)
    with Terminal(
        chat(*words, python=warm_python(*LATE)), environment={"GLMTUNE_API_KEY": KEY}, home=tmp_path
    ) as terminal:
        assert f"glm-tiny at {tuned_server.url}/v1; adapter ads" in terminal.until(READY)
        assert "ads (prefix), low (lora)" in say(terminal, "/adapter")
        assert_each_is_its_own(with_each(terminal))
        say(terminal, "/max_new_tokens 100000")
        terminal.type("x\r")
        assert "HTTP 400" in terminal.until(READY)
        terminal.type("quit\r")
        assert terminal.end() == 0
        assert KEY.encode() not in terminal.raw


def test_tools_of_a_model_here_and_of_a_server(tools_base: tuple[Path, Path], tmp_path: Path) -> None:
    model, tools = tools_base
    said: list[str] = []
    with serve(f"model={model}") as served:
        for place in (f"model={model}", f"url={served.url}"):
            with Terminal(
                chat(place, f"tools={tools}", *GREEDY, python=warm_python(*LATE)), home=tmp_path
            ) as terminal:
                terminal.until(READY)
                assert "tools: get_weather" in say(terminal, "/tools")
                said.append(answer_to(terminal, "天气？"))
                say(terminal, "/tools off")
                said.append(answer_to(terminal, "天气？"))
                terminal.type("exit\r")
                assert terminal.end() == 0
    with_tools, without = said[:2]
    assert with_tools.strip()
    assert with_tools != without, "the tools stand in the prompt"
    assert said[2:] == said[:2], "a server answers the same"


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["url_model=adz"], {"GLMTUNE_API_KEY": KEY}, "Did you mean `ads`"),
        ([], {"GLMTUNE_API_KEY": "sk-wrong"}, "HTTP 401"),
        ([], {"GLMTUNE_API_KEY": "", "OPENAI_API_KEY": ""}, "HTTP 401"),
    ],
)
def test_what_a_server_refuses(
    tuned_server: Served,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    environment: dict[str, str],
    message: str,
) -> None:
    from glmtune.cli import main

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["chat", f"url={tuned_server.url}", *words]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert "sk-" not in error
