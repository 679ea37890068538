"""The chat page at /, in a real Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glmtune.serving.service.routes import PAGE
from tests.serving.service.served import Served, serve

KEY = "key-of-the-page-123"


def test_page_asks_nobody_else(served: Served) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert (
        re.findall(
            r"https?://|//[a-z]+\.|@import|url\(|innerHTML|insertAdjacentHTML|document\.write|eval\(", text
        )
        == []
    )
    policy = served.ask("/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    with serve(environment={"GLMTUNE_API_KEYS": KEY}) as server:
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless browser, or the reason why there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    named = os.environ.get("GLMTUNE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as started:
        path = named or started.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium here: `playwright install chromium`, or name one in GLMTUNE_CHROMIUM")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page that was opened, and what it asked for and complained of."""

    def __init__(self, chromium: Any, url: str, *, locale: str = "en-US", width: int = 390) -> None:
        self.context = chromium.new_context(locale=locale, viewport={"width": width, "height": 800})
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "console", lambda line: self.complaints.append(line.text) if line.type == "error" else None
        )
        self.page.goto(url)

    def ask(self, question: str) -> None:
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")

    def answered(self) -> str:
        self.page.wait_for_selector("#send:not([hidden])", timeout=60_000)
        return self.page.inner_text(".turn.assistant:last-child .body")


def test_a_conversation_at_390_pixels(served: Served, chromium: Any) -> None:
    opened = Opened(chromium, served.url)
    page = opened.page
    page.wait_for_selector("#model option[value=glm-tiny]", state="attached")
    page.click("#more")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "40")
    opened.ask("你好")
    assert "你好" in opened.answered()
    opened.ask("小明有3个苹果，又买了5个，一共有几个？")
    opened.answered()
    assert page.locator(".turn").count() == 4
    assert page.locator(".turn .error:not(:empty)").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#clear")
    assert page.locator(".turn").count() == 0
    assert opened.complaints == []
    assert {url.split("/")[2] for url in opened.requests if not url.startswith("data:")} == {
        f"127.0.0.1:{served.port}"
    }


def test_stop_keeps_what_came(served: Served, chromium: Any) -> None:
    opened = Opened(chromium, served.url)
    page = opened.page
    page.route(
        "**/v1/chat/completions",
        lambda route: route.continue_(
            post_data=re.sub(r"}$", ',"ignore_eos":true}', route.request.post_data)
        ),
    )
    opened.ask("你好")
    body = page.locator(".turn.assistant .body")
    deadline = time.monotonic() + 60
    while len(body.inner_text()) <= 3:  # `wait_for_function` evaluates text, which the page's policy forbids
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)
    page.click("#stop")
    text = opened.answered()
    assert len(text) > 3
    assert page.inner_text(".turn.assistant .note") == "stopped"
    served.await_metric("glmtune_requests_running", 0)


def test_thoughts_stand_above_the_answer_and_are_not_asked_with(served: Served, chromium: Any) -> None:
    opened = Opened(chromium, served.url)
    page = opened.page
    deltas = [{"reasoning_content": "2 and"}, {"reasoning_content": " <b>2</b>"}, {"content": "Four."}]
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.post_data else None)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=stream),
    )
    opened.ask("How many?")
    assert opened.answered() == "Four."
    assert page.inner_text(".turn.assistant .thoughts") == "2 and <b>2</b>"
    opened.ask("Sure?")
    opened.answered()
    assert sent[-1]["messages"][1] == {"role": "assistant", "content": "Four."}
    assert opened.complaints == []


def test_text_stays_text_and_code_is_readable(served: Served, chromium: Any) -> None:
    opened = Opened(chromium, served.url)
    page = opened.page
    answer = (
        "<img src=x onerror=alert(1)>\n<script>alert(2)</script>\n```python\nif a < b:\n    c()\n```\n末行"
    )
    events = [
        {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in answer
    ]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ": comment\n\ndata: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=stream),
    )
    opened.ask("<b>question</b>")
    opened.answered()
    assert page.inner_text(".turn.user .body") == "<b>question</b>"
    assert page.locator(".turn img, .turn script, .turn b").count() == 0
    assert page.inner_text(".turn.assistant pre") == "if a < b:\n    c()"
    assert "<script>alert(2)</script>" in page.inner_text(".turn.assistant .text >> nth=0")
    assert page.inner_text(".turn.assistant .text >> nth=1") == "末行"
    assert opened.complaints == []


def test_key_is_asked_for_and_kept_in_the_tab(locked: Served, chromium: Any) -> None:
    opened = Opened(chromium, locked.url, locale="zh-CN", width=1200)
    page = opened.page
    page.wait_for_selector("#settings:not([hidden])")
    assert "密钥" in page.inner_text("#model option")
    page.fill("#key", KEY)
    page.press("#key", "Tab")
    page.wait_for_selector("#model option[value=glm-tiny]", state="attached")
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    opened.ask("你好")
    assert "你好" in opened.answered()
    assert KEY not in locked.said()
    other = Opened(chromium, locked.url)
    assert other.page.input_value("#key") == ""


def test_languages(served: Served, chromium: Any) -> None:
    page = Opened(chromium, served.url, locale="zh-CN").page
    assert page.inner_text("#send") == "发送"
    page.click("#language")
    assert page.inner_text("#send") == "Send"
    assert page.get_attribute("html", "lang") == "en"


def test_errors_are_shown_and_left_out_of_the_conversation(served: Served, chromium: Any) -> None:
    opened = Opened(chromium, served.url)
    page = opened.page
    page.wait_for_selector("#model option[value=glm-tiny]", state="attached")
    page.click("#more")
    page.fill("#max_tokens", "900000")
    opened.ask("你好")
    opened.answered()
    assert "900000" in page.inner_text(".turn.assistant .error")
    page.fill("#max_tokens", "8")
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.post_data else None)
    opened.ask("你好")
    assert "你好" in opened.answered()
    assert sent[-1]["messages"] == [{"role": "user", "content": "你好"}]


def test_strength_is_for_what_was_tuned(chromium: Any, tmp_path: Path) -> None:
    from glmtune.loading import load_base
    from glmtune.prefix.checkpoint import save_prefix
    from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
    from glmtune.training.adapt import tune_adapter
    from glmtune.training.settings import LoraSettings

    model = load_base("glm-tiny", device="cpu")
    save_prefix(PrefixEncoder(prefix_shape(model.config), pre_seq_len=4), tmp_path / "style")
    tune_adapter(model, LoraSettings(rank=2)).save(tmp_path / "low")
    words = (f"prefix_path={{style:{tmp_path}/style}}", f"adapter_path={{low:{tmp_path}/low}}")
    with serve(*words) as served:
        opened = Opened(chromium, served.url)
        page = opened.page
        page.wait_for_selector("#model option[value=style]", state="attached")
        page.click("#more")
        assert not page.is_visible("#strength")
        page.select_option("#model", "style")
        assert page.is_visible("#strength")
        page.fill("#strength", "0.5")
        page.fill("#max_tokens", "4")
        sent: list[Any] = []
        page.on("request", lambda request: sent.append(request.post_data_json) if request.post_data else None)
        opened.ask("你好")
        opened.answered()
        assert (sent[-1]["model"], sent[-1]["prefix_strength"]) == ("style", 0.5)
        page.select_option("#model", "low")
        assert page.is_visible("#strength")
        opened.ask("你好")
        opened.answered()
        assert (sent[-1]["model"], sent[-1]["adapter_scale"]) == ("low", 0.5)
        assert "prefix_strength" not in sent[-1]
