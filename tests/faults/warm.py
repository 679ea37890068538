"""Run commands in forks of one process that has imported everything: hundreds of starts for the price of one.

Reads one request a line (JSON) on its input and answers with one line. The process it forks for a request is a
session leader with a folder, a log and an environment of its own, and then runs `glmtune.cli.main` as a shell would;
it may be killed from here after a while, with all that it started.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from contextlib import suppress
from typing import Any

import torch

from glmtune.cli import COMMANDS

NEEDED = (
    *("datasets", "matplotlib.figure", "peft", "torch.utils.tensorboard"),
    *(recipe for recipe, _ in COMMANDS.values()),
    *("glmtune.training.session", "glmtune.training.trainer", "glmtune.inference.predict.predict"),
    *("glmtune.export.export", "glmtune.quantization.files.write"),
    *("evaluation.backends.glm", "evaluation.compare.build"),
)


def import_everything() -> None:
    """Import what commands import on their way, which takes seconds."""
    for name in NEEDED:
        importlib.import_module(name)
    torch.set_num_threads(1)


def command(request: dict[str, Any]) -> int:
    """Be the command of a request, in a process of its own."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    preloaded = ctypes.CDLL(None)
    if hasattr(preloaded, "fault_arm"):
        preloaded.fault_arm()
    # Forks would share the state of their parent, where processes that are started each have their own.
    random.seed()
    from glmtune.cli import main

    try:
        return main(request["words"])
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run a request to its end, or to the moment when it is killed."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = command(request)
        finally:
            os._exit(code)
    deadline = start + (request["kill_after"] or request["timeout"])
    killed = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if not killed and time.monotonic() > deadline:
            killed = True
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
                continue
            os.kill(child, signal.SIGKILL)  # before it had made its own group
        time.sleep(0.002)
    with suppress(ProcessLookupError):  # what it started ends with it, as with a terminal that is closed
        os.killpg(child, signal.SIGKILL)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - start,
        "timed_out": killed and not request["kill_after"],
    }


def main() -> None:
    import_everything()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
