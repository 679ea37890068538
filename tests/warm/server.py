"""Imports everything once, and then forks a process for every request of `client.py`: seconds saved each time.

A fork is what a new process would be: its words, folder, environment, streams and `__main__` are its own, and it is
the leader of its own session. It differs in that modules are there before it imports them, so that what a command
must import by itself is for the tests that start real ones: the first run of every command in `test_readme.py`, and
`test_start_up.py`.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import types
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

IMPORTED = (
    *("accelerate", "datasets", "fastapi", "matplotlib.figure", "pandas", "peft", "uvicorn"),
    *("torch.utils.tensorboard", "transformers.generation.utils"),
    *("glmtune.training.session", "glmtune.training.trainer", "glmtune.inference.predict.predict"),
    *("glmtune.export.export", "glmtune.quantization.files.write"),
    *("evaluation.backends.glm", "evaluation.compare.build"),
)


@dataclass
class Fork:
    """A process that was forked, in the eyes of the one that did it."""

    pid: int
    connection: socket.socket
    handle: int


def import_everything() -> None:
    """Import what commands import on their way."""
    import numpy  # noqa: F401
    import torch

    from glmtune.cli import COMMANDS

    for name in (*IMPORTED, *(recipe for recipe, _ in COMMANDS.values())):
        importlib.import_module(name)
    torch.set_num_threads(1)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Read a request and the streams that come with it."""
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    wanted, body = int.from_bytes(head, "big"), b""
    while len(body) < wanted:
        body += connection.recv(min(wanted - len(body), 65536)) or exit("a request broke off")
    return json.loads(body), streams


def serve(listener: socket.socket) -> dict[str, Any] | None:
    """Fork until the test session ends: None then; in a fork its request."""
    forks: list[Fork] = []
    with selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ, None)
        ready.register(0, selectors.EVENT_READ, None)
        while True:
            for key, _ in ready.select():
                if key.fileobj == 0:  # closed: the tests are over
                    for fork in forks:
                        os.kill(fork.pid, signal.SIGKILL)
                    return None
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    request, streams = receive(connection)
                    pid = os.fork()
                    if pid == 0:
                        for each in forks:
                            each.connection.close()
                            os.close(each.handle)
                        connection.close()
                        listener.close()
                        return request | {"streams": streams}
                    for stream in streams:
                        os.close(stream)
                    fork = Fork(pid, connection, os.pidfd_open(pid))
                    forks.append(fork)
                    ready.register(connection, selectors.EVENT_READ, fork)
                    ready.register(fork.handle, selectors.EVENT_READ, fork)
                elif key.data in forks and key.fileobj == key.data.handle:
                    fork = key.data
                    code = os.waitstatus_to_exitcode(os.waitpid(fork.pid, 0)[1])
                    with suppress(OSError):
                        fork.connection.sendall(str(code).encode())
                    for each in (fork.handle, fork.connection):
                        with suppress(KeyError, ValueError):
                            ready.unregister(each)
                    fork.connection.close()
                    os.close(fork.handle)
                    forks.remove(fork)
                elif key.data in forks:
                    with suppress(ConnectionError):
                        numbers = key.data.connection.recv(64)
                        if not numbers:  # whoever asked was killed
                            ready.unregister(key.data.connection)
                            os.kill(key.data.pid, signal.SIGKILL)
                        for number in numbers:
                            os.kill(key.data.pid, number)


def anew(stream: Any) -> Any:
    """Open a standard stream once more: the object remembers whether what it was opened for can be sought in."""
    number, is_input = stream.fileno(), stream.fileno() == 0
    return open(
        number,
        "r" if is_input else "w",
        buffering=1 if number == 2 or os.isatty(number) else -1,
        encoding=stream.encoding,
        errors=stream.errors,
        closefd=False,
    )


def become(request: dict[str, Any]) -> None:
    """Be the process that was asked for, up to its end."""
    os.setsid()
    for place, stream in enumerate(request["streams"]):
        os.dup2(stream, place)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = map(anew, (sys.stdin, sys.stdout, sys.stderr))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    # Forks would share the state of their parent, where new processes have their own.
    random.seed()
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].seed()
    option, program, *words = request["words"]
    if option == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = [program, *words]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, "")
        sys.argv = ["-c", *words]
        main_module = types.ModuleType("__main__")
        sys.modules["__main__"] = main_module
        exec(compile(program, "<string>", "exec"), main_module.__dict__)


def end(request: dict[str, Any]) -> NoReturn:
    """Be the process that was asked for, and end as Python does, without taking everything imported apart."""
    code = 0
    try:
        become(request)
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if isinstance(ending.code, str):
            sys.stderr.write(f"{ending.code}\n")
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 120  # as Python's own
    os._exit(code & 0xFF)


def main() -> None:
    """Import, say so, and serve."""
    place = Path(sys.argv[1])
    del sys.path[0]  # the folder of this file
    import_everything()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen(64)
        gc.collect()
        gc.freeze()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        request = serve(listener)
    if request is None:
        shutil.rmtree(place.parent, ignore_errors=True)
        return
    end(request)


if __name__ == "__main__":
    main()
