"""The READMEs' lines that talk: `glmtune chat` in a terminal, `glmtune serve` to a client, `glmtune web` in a browser.

They run until they are told to end, so they are no part of `test_readme.py`. Settings of a line stay as they
are, but for the model, which is the embedded one here, and the port, which is a free one.
"""

from __future__ import annotations

import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.browser import open_browser
from tests.contract.test_readme import LONG_RUNNING, commands
from tests.interactive.pseudo_terminal import Terminal
from tests.interactive.web.opened import open_in
from tests.interactive.web.web_process import web_process
from tests.serving.service.served import serve

QUESTION, RIGHT = "12+30", "42"
OURS = re.compile(r"(model(\.source)?|port|server_port)=.*")


def lines(start: str) -> list[str]:
    """Return the lines of both READMEs that begin so, and the plain one."""
    found = [line for readme in ("README.md", "README.zh.md") for line in commands(readme)]
    return list(dict.fromkeys([start, *(line for line in found if line.startswith(start))]))


def words_of(line: str) -> list[str]:
    """Return the settings of a line, without those that a test replaces."""
    return [word for word in shlex.split(line)[2:] if not OURS.fullmatch(word)]


def test_the_readmes_say_how_to_talk() -> None:
    said = commands("README.md")
    assert set(LONG_RUNNING) <= {" ".join(line.split()[:2]) for line in said}
    assert all(line in said for line in LONG_RUNNING), "each works without a setting"


@pytest.mark.parametrize("line", lines("glmtune chat"))
def test_chat(line: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "glmtune", "chat", *words_of(line)]
    with Terminal(command, home=tmp_path) as terminal:
        terminal.until(r"\n> ?$")
        terminal.type("/temperature 0\r")
        terminal.until(r"\n> ?$")
        terminal.type(f"{QUESTION}\r")
        answer = terminal.until(r"\[\d+ tokens[^\]]*\]")
        assert RIGHT in answer
        terminal.until(r"\n> ?$")
        terminal.type("stop\r")
        assert terminal.end() == 0


@pytest.mark.parametrize("line", lines("glmtune serve"))
def test_serve(line: str) -> None:
    with serve(*words_of(line), python=[sys.executable]) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        messages: Any = [{"role": "user", "content": QUESTION}]
        reply = client.chat.completions.create(model="glm-tiny", messages=messages, temperature=0)
        assert RIGHT in (reply.choices[0].message.content or "")
        served.signal(signal.SIGTERM)
        assert served.wait() == 0, served.said()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.mark.parametrize("line", lines("glmtune web"))
def test_web(line: str, browser: Any, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    with web_process(tmp_path, *words_of(line)) as running:
        context = browser.new_context(locale="en-US")
        opened = open_in(context, running.url)
        opened.open_part("Sampling")
        opened.set_number("temperature", 0)
        opened.ask(QUESTION)
        assert RIGHT in opened.wait_for_answer()
        assert opened.faults == []
        context.close()
        assert running.end(signal.SIGTERM) == 0, running.log.read_text()
