"""`glmtune web url=`: the page over a real `glmtune serve`, with its adapters, its key and its tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interactive.conftest import KEY
from tests.interactive.web.test_command import choose, greedy
from tests.interactive.web.web_process import web_process
from tests.serving.service.served import Served, serve


def test_adapters_of_a_server(tuned_server: Served, open_page, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    with web_process(tmp_path, f"url={tuned_server.url}", environment={"GLMTUNE_API_KEY": KEY}) as running:
        opened = open_page(running.url)
        assert opened.page.locator("#top .model").inner_text() == "glm-tiny"
        greedy(opened)
        opened.page.locator("#keeps_defaults input").uncheck()
        opened.page.locator("#compare input").check()
        opened.page.locator("#base").wait_for()
        pairs = {}
        for strength in (1, 0):
            opened.set_number("strength", strength)
            opened.ask("Hello, who are you?")
            pairs[strength] = (opened.wait_for_answer(), opened.wait_for_answer(which="base"))
            opened.page.locator("#new").click()
            opened.wait(lambda: opened.answers() == [], "new chat")
        assert pairs[0][1] == pairs[1][1]
        assert pairs[0][1].startswith("I am glm-tiny")
        assert pairs[0][0] == pairs[0][1], "strength 0 is the base"
        assert pairs[1][0] != pairs[1][1]
        choose(opened, "low (lora)")
        opened.set_number("strength", 1)
        opened.ask("Hello, who are you?")
        assert opened.wait_for_answer() not in pairs[1]
        assert opened.faults == []
        assert running.end() == 0
        assert KEY not in running.log.read_text()


def test_tools_of_a_server(tools_base: tuple[Path, Path], open_page, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    model, tools = tools_base
    with serve(f"model={model}") as served, web_process(tmp_path, f"url={served.url}") as running:
        answers = []
        for text in (tools.read_text(encoding="utf-8"), ""):
            opened = open_page(running.url)
            greedy(opened)
            opened.page.locator("#keeps_defaults input").uncheck()
            opened.open_part("Tools")
            opened.page.locator("#tools textarea").fill(text)
            opened.ask("天气？")
            answers.append(opened.wait_for_answer())
        assert all(answers)
        assert answers[0] != answers[1], "the tools stand in the prompt"
