"""Servers for the tests of the routes: over glm-tiny, over random models, over engines that follow a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from glmtune.inference.load_engine import load_engine
from glmtune.inference.requests.chat import AnswerEvent, ChatEngine
from glmtune.loading import load_tokenizer
from glmtune.models.settings import ModelSettings
from glmtune.serving.api.state import ServingState
from tests.models.templates.chat_folders import FORMS, chat_tokenizer
from tests.serving.api.doubles import ScriptedChat, ScriptedEngine
from tests.serving.api.running_server import RunningServer, serving

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "tokenizers"
GENERATIONS = ("chatglm", "chatglm2", "chatglm3", "glm4")
WITH_TOOLS = ("chatglm3", "glm4")


@pytest.fixture(scope="session")
def tokenizers(
    tiny_tokenizer: Any, tiny_chatglm3_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A small tokenizer of every generation, and of folders in transformers' format."""
    folder = tmp_path_factory.mktemp("folders")
    return {
        "chatglm": load_tokenizer(GOLDEN / "chatglm", family="chatglm"),
        "chatglm2": tiny_tokenizer,
        "chatglm3": tiny_chatglm3_tokenizer,
        "glm4": load_tokenizer(GOLDEN / "glm4", family="glm4"),
        "folder": chat_tokenizer(folder / "roles", FORMS["roles"]),
        "thinking": chat_tokenizer(folder / "thinking", FORMS["thinking-tools"]),
    }


@pytest.fixture(scope="session")
def glm_tiny() -> Iterator[ChatEngine]:
    """The embedded model, running."""
    chat = load_engine(ModelSettings(source="glm-tiny", dtype="float32", device="cpu"))
    engine: Any = chat.engine
    engine.start()
    yield chat
    engine.stop()


@pytest.fixture(scope="session")
def live(glm_tiny: ChatEngine) -> Iterator[RunningServer]:
    """A server over the embedded model."""
    with serving(ServingState(names=("glm-tiny",), chat=glm_tiny)) as server:
        yield server


class Scripts:
    """Starts servers whose model writes what it is told."""

    def __init__(self, stack: ExitStack, tokenizers: dict[str, Any]) -> None:
        self._stack, self.tokenizers = stack, tokenizers

    def start(
        self,
        said: str | Sequence[int],
        family: str = "chatglm2",
        *,
        ends: bool = True,
        context: int = 4096,
        **state: Any,
    ) -> RunningServer:
        """Serve an engine that writes a text, or tokens, and (``ends``) the token that ends answers."""
        tokenizer = self.tokenizers[family]
        ids = tokenizer.text_ids(said) if isinstance(said, str) else said
        engine = ScriptedEngine(ids, end=tokenizer.end_id if ends else None, context=context)
        return self._serve(ChatEngine(engine, tokenizer), state)

    def answers(self, *events: AnswerEvent, family: str = "chatglm3", **state: Any) -> RunningServer:
        """Serve conversations that are answered by events."""
        return self._serve(ScriptedChat(ScriptedEngine([]), self.tokenizers[family], events), state)

    def _serve(self, chat: ChatEngine, state: dict[str, Any]) -> RunningServer:
        return self._stack.enter_context(serving(ServingState(names=("base",), chat=chat, **state)))


@pytest.fixture
def scripts(tokenizers: dict[str, Any]) -> Iterator[Scripts]:
    with ExitStack() as stack:
        yield Scripts(stack, tokenizers)


StartScript = Callable[..., RunningServer]
