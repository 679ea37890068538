"""The page in a browser: served from this process over scripted answers, or by `glmtune web` over glm-tiny."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from glmtune.inference.requests.chat import AnswerEvent, CallDelta, CallStart, Finished, TextDelta
from glmtune.inference.requests.sampling import Sampling
from glmtune.interactive.answerer import AdapterChoice, AnswerStream
from glmtune.listening import listen
from tests.browser import open_browser
from tests.interactive.tuned import Tuned
from tests.interactive.web.opened import OpenPage, open_in
from tests.interactive.web.web_process import WebProcess, web_process


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@dataclass
class Asked:
    """One question to the scripted answerer."""

    messages: list[dict[str, Any]]
    sampling: Any
    adapter: str
    strength: float
    tools: list[Any]
    is_cancelled: threading.Event = field(default_factory=threading.Event)


class ScriptedAnswerer:
    """Answers with what a test says; one that is told to go on writes until it is cancelled."""

    model_name = "scripted <b>model</b>"
    sampling_defaults = Sampling(temperature=0.8, top_p=0.8)
    knows_tools = True

    def __init__(self) -> None:
        self.adapters: Sequence[AdapterChoice] = (
            AdapterChoice("ads", "prefix"),
            AdapterChoice("low", "lora"),
        )
        self.asked: list[Asked] = []
        self.script: Callable[[Asked], list[AnswerEvent] | None] = lambda asked: says("ok")

    def answer(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        sampling: Any,
        adapter: str = "",
        strength: float = 1.0,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> AnswerStream:
        asked = Asked([dict(each) for each in messages], sampling, adapter, strength, list(tools))
        self.asked.append(asked)
        events = self.script(asked)
        stream = AnswerStream(asked.is_cancelled.set)
        if events is None:
            threading.Thread(target=self._go_on, args=(asked, stream), daemon=True).start()
        for event in events or ():
            stream.put(event)
        return stream

    def close(self) -> None:
        pass

    def _go_on(self, asked: Asked, stream: AnswerStream) -> None:
        number = 0
        while not asked.is_cancelled.wait(0.02):
            stream.put(TextDelta(f"word{number} "))
            number += 1


def says(text: str, reason: Any = "stop") -> list[AnswerEvent]:
    return [TextDelta(text), Finished(reason, 1, 1)]


def calls(name: str, arguments: str) -> list[AnswerEvent]:
    return [CallStart(0, name), CallDelta(0, arguments), Finished("tool_calls", 1, 1)]


@dataclass
class Served:
    """A page that is served."""

    url: str
    answerer: ScriptedAnswerer


@contextlib.contextmanager
def serving(login: Any = None, **settings: Any) -> Iterator[Served]:
    """Serve the page over scripted answers from a thread of this process."""
    pytest.importorskip("gradio")
    from glmtune.interactive.web.serve import prepare
    from glmtune.interactive.web.settings import WebSettings

    prepare()
    import uvicorn

    from glmtune.interactive.web.app import build_app

    chosen = WebSettings(server_port=0, **settings)
    answerer = ScriptedAnswerer()
    [listener] = listen(chosen.server_name, 0)
    with listener:
        app, stop_all = build_app(answerer, chosen, login)
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", answerer)
        finally:
            stop_all()
            server.should_exit = True
            thread.join(10)


@pytest.fixture(scope="session")
def scripted_server() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture
def scripted(scripted_server: Served) -> Served:
    """The page over scripted answers, as if it were fresh."""
    scripted_server.answerer.asked.clear()
    scripted_server.answerer.script = lambda asked: says("ok")
    return scripted_server


@pytest.fixture(scope="module")
def kept_contexts(browser: Any) -> dict[Any, Any]:
    """Browsers that were there before, by their options: what a page is made of is loaded once for each."""
    return {}


@pytest.fixture
def open_page(browser: Any, kept_contexts: dict[Any, Any]) -> Iterator[Callable[..., OpenPage]]:
    """Open an address in a browser that keeps no chat; each one of a test has a browser of its own."""
    used, fresh, urls = dict[Any, Any](), list[Any](), set[str]()

    def opened(url: str, *, width: int = 1200, locale: str = "en-US", **options: Any) -> OpenPage:
        settings = {"viewport": {"width": width, "height": 800}, "locale": locale, **options}
        key = str(sorted(settings.items()))
        urls.add(url)
        if key in used:
            fresh.append(browser.new_context(**settings))
            return open_in(fresh[-1], url)
        used[key] = kept_contexts.pop(key, None) or browser.new_context(**settings)
        return open_in(used[key], url)

    yield opened
    for context in fresh:
        context.close()
    for key, context in used.items():
        for page in context.pages:
            page.close()
        page = context.new_page()
        devtools = context.new_cdp_session(page)
        for url in urls:
            devtools.send("Storage.clearDataForOrigin", {"origin": url, "storageTypes": "all"})
        page.close()
        kept_contexts[key] = context


@pytest.fixture(scope="module")
def command(tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebProcess]:
    """`glmtune web` with a prefix and a LoRA; it ends with 0 when it is interrupted."""
    pytest.importorskip("gradio")
    words = (f"prefix_path={tuned.prefix}", f"adapter_path={tuned.lora}")
    with web_process(tmp_path_factory.mktemp("web"), *words) as running:
        yield running
        assert running.end() == 0
