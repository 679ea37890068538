"""An event loop that turns only while somebody waits for what runs in it, and ends with all that does.

So there is nothing to join or to hurry up when a run stops (an error, Ctrl-C), as there would be with
threads: leaving `event_loop` cancels whatever is under way, pauses included, and nothing is sent any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


class RunToEnd(Protocol):
    """Runs a coroutine to its end in the loop that `event_loop` opened."""

    def __call__(self, step: Coroutine[Any, Any, Result], /) -> Result:
        """Return what the coroutine returns, or raise what it raises."""
        ...


@contextlib.contextmanager
def event_loop() -> Generator[RunToEnd]:
    """Open an event loop; leaving it cancels everything that was begun in it.

    Yields:
        What runs a coroutine in it.
    """
    if _is_in_a_loop():
        with _loop_of_a_thread() as run:
            yield run
    else:
        with asyncio.Runner() as runner:
            yield runner.run


def _is_in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def _loop_of_a_thread() -> Generator[RunToEnd]:
    """Give a notebook, whose own loop fills its thread, a second one in a thread that only waits for us."""
    runner = asyncio.Runner()

    def run(step: Coroutine[Any, Any, Result]) -> Result:
        asked = thread.submit(runner.run, step)
        try:
            return asked.result()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                loop = runner.get_loop()
                loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
            raise

    with ThreadPoolExecutor(1) as thread:
        thread.submit(runner.get_loop).result()
        try:
            yield run
        finally:
            thread.submit(runner.close).result()
