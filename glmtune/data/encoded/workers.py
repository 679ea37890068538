"""Processes that encode side by side; rows come back in the order in which they went.

Each is a Python of its own that reads batches from its standard input and writes results to its standard
output, until that input ends, as it does when the parent is gone, however it went. Nothing of the parent's
main module is imported in it, as `multiprocessing` would, so any script may load a large data set.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, Generic, TypeVar

from glmtune.data.encoded.batches import encode_batch, measure_batch
from glmtune.data.records import Conversation
from glmtune.data.settings import DataSettings
from glmtune.errors import GlmtuneError
from glmtune.models.templates.renderer import TextTokenizer

MOST_WORKERS = 4
"""That are taken without being asked for: each holds the tokenizer, and a machine has other work as well."""
AHEAD = 3
"""Batches that wait for each process, so that none waits for the parent to read."""
TASKS: dict[str, Callable[[TextTokenizer, DataSettings, Sequence[Conversation]], Any]] = {
    "encode": encode_batch,
    "measure": measure_batch,
}
Result = TypeVar("Result")


def usual_workers() -> int:
    """Return how many processes encode a large data set where nobody says: as many as cores, 4 at most."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, usable)


def run_batches(
    task: str,
    batches: Iterable[Sequence[Conversation]],
    tokenizer: TextTokenizer,
    settings: DataSettings,
    *,
    num_workers: int,
) -> Iterator[tuple[Sequence[Conversation], Any]]:
    """Encode or measure batches.

    Args:
        task: of ``TASKS``.
        batches: of conversations; some are taken ahead.
        tokenizer: a GLM tokenizer, which is sent to the processes.
        settings: the data settings.
        num_workers: processes; 1: this one, and no other.

    Yields:
        Each batch with its result, in the order of the batches.

    Raises:
        GlmtuneError: what encoding raised; or a process was ended from outside.
    """
    if num_workers <= 1:
        for batch in batches:
            yield batch, TASKS[task](tokenizer, settings, batch)
        return
    with _Pool(pickle.dumps((task, tokenizer, settings)), num_workers) as pool:
        waiting: deque[tuple[Sequence[Conversation], Future[Any]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(batch)))
            if len(waiting) >= AHEAD * num_workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


class _Pool(Generic[Result]):
    """Some workers, and a thread for each that waits for it."""

    def __init__(self, setup: bytes, count: int) -> None:
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(setup) for _ in range(count)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="glmtune-encode")

    def submit(self, batch: Sequence[Conversation]) -> Future[Any]:
        return self._threads.submit(self._run, batch)

    def _run(self, batch: Sequence[Conversation]) -> Any:
        worker = self._idle.get()
        try:
            return worker.run(batch)
        finally:
            self._idle.put(worker)

    def __enter__(self) -> _Pool[Any]:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:  # nobody waits for what is left
            for worker in self._workers:
                worker.process.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()


class _Worker:
    """A process that encodes, seen from the parent."""

    def __init__(self, setup: bytes) -> None:
        # As found by this process, however it was started.
        places = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(  # noqa: S603 - this Python, and words of this file
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": places},
        )
        self._setup: bytes | None = setup

    def run(self, batch: Sequence[Conversation]) -> Any:
        sent, got = self.process.stdin, self.process.stdout
        assert sent is not None
        assert got is not None
        try:
            if self._setup is not None:
                _send(sent, self._setup)
                self._setup = None
            _send(sent, pickle.dumps(batch))
            found = pickle.loads(_receive(got))  # noqa: S301 - of a process that this one has started
        except (OSError, EOFError):
            code = self.process.wait()
            raise GlmtuneError(
                f"A process that encodes rows ended ({_ending(code)}). If memory ran out, use fewer of them:"
                " `data.num_workers=1`."
            ) from None
        if isinstance(found, _Failure):
            raise found.error
        return found

    def close(self) -> None:
        sent, got = self.process.stdin, self.process.stdout
        for pipe in (sent, got):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue
        self.process.wait()


class _Failure:
    """An error in a worker, on its way to the parent."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _ending(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _send(pipe: IO[bytes], content: bytes) -> None:
    pipe.write(len(content).to_bytes(8, "little") + content)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    size = int.from_bytes(_exactly(pipe, 8), "little")
    return _exactly(pipe, size)


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    content = pipe.read(count)
    if len(content) < count:
        raise EOFError
    return content


def serve() -> None:
    """Be a worker: read tokenizer and settings, then batches, and write what they become."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent ends what it began
    results, batches = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)  # whoever prints must not write among the results
    try:
        task, tokenizer, settings = pickle.loads(_receive(batches))  # noqa: S301 - of the parent
        while True:
            _send(results, pickle.dumps(_result(task, tokenizer, settings, pickle.loads(_receive(batches)))))  # noqa: S301
    except (EOFError, BrokenPipeError):
        return


def _result(
    task: str, tokenizer: TextTokenizer, settings: DataSettings, batch: Sequence[Conversation]
) -> Any:
    try:
        return TASKS[task](tokenizer, settings, batch)
    except GlmtuneError as error:
        return _Failure(error)
    except Exception as error:
        # Perhaps of a class that cannot be sent: its words can.
        return _Failure(RuntimeError(f"{error!r}\n{traceback.format_exc()}"))
