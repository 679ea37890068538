"""What is loaded is never searched for garbage again, which would stop every answer for half a second."""

from __future__ import annotations

import gc

from glmtune.serving.run import _Loading
from tests.serving.api.doubles import ScriptedEngine


class Engine(ScriptedEngine):
    def start(self) -> None:
        self.is_started = True


class Chat:
    def __init__(self) -> None:
        self.engine = Engine([])


def test_what_is_loaded_is_no_garbage() -> None:
    before = gc.get_freeze_count()
    loading = _Loading(Chat)  # type: ignore[arg-type]
    try:
        loading.start()
        loading.join()
        assert loading.error is None
        assert loading.chat is not None
        assert gc.get_freeze_count() > before + 10_000  # the libraries alone are that many objects
    finally:
        gc.unfreeze()
