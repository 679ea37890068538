"""Collectives: what the processes of a run must do or know at the same time.

In one process all of them work, too, and cost nothing, so callers need not ask how many processes there are.

Every function here that talks to other processes is a collective: all processes must call it, and in the same
order. One that leaves early, after an error for example, would leave the others waiting until their time-out.
Therefore errors travel: a block under `propagate_errors` or `propagate_write_errors` that fails in one
process fails in all.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from glmtune.errors import ConfigError, GlmtuneError, TrainingError

Value = TypeVar("Value")
# PyTorch has no class of error for a lost partner: gloo raises RuntimeError with the words of the system call
# (closed, reset, broken) or of its own time-out; only NCCL and the stores raise classes named Dist...Error.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout", "Timed out")
"""What the collectives of PyTorch say when another process has ended or does not answer."""


def init_processes(device: torch.device, timeout_seconds: int) -> PartialState:
    """Connect to the other processes of this run, if there are any.

    Args:
        device: where training will run.
        timeout_seconds: how long to wait for the others, now and in every later collective.

    Returns:
        Who this process is.

    Raises:
        TrainingError: the others cannot be reached.
    """
    several = {"timeout": timedelta(seconds=timeout_seconds)} if "WORLD_SIZE" in os.environ else {}
    try:
        return PartialState(cpu=device.type == "cpu", **several)
    except RuntimeError as error:
        raise TrainingError(
            f"The processes of this run did not find each other within {timeout_seconds} seconds: "
            f"{str(error).splitlines()[0]}. Check that all were started, and that machine 0 answers at "
            "`launch.master_addr` and `launch.master_port`."
        ) from error


def is_distributed() -> bool:
    """Tell whether this run has more than one process."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def place() -> tuple[int, int]:
    """Return the rank of this process, and how many processes there are."""
    if not is_distributed():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def is_main_process() -> bool:
    """Tell whether this process is rank 0 of all."""
    return not is_distributed() or torch.distributed.get_rank() == 0


def barrier() -> None:
    """Wait until every process has come here."""
    if is_distributed():
        torch.distributed.barrier()


def new_gloo_group(timeout_seconds: float) -> Any:
    """Connect the processes once more, for threads that talk while training goes on.

    Two threads may not share one group: its collectives match by their order alone, so a message of the
    writer thread could be taken for one of the training thread. gloo, because what the writers exchange are
    Python objects in host memory, which must not queue behind the kernels of a GPU.

    Returns:
        The process group; None for a single process.
    """
    if not is_distributed():
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))


def all_gather(value: Value, group: Any = None) -> list[Value]:
    """Return the value of each process, by rank.

    Args:
        value: of this process; can be pickled.
        group: the process group to use; None: that of training.
    """
    if not is_distributed():
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value, group=group)
    return found


def broadcast_from_main(make: Callable[[], Value]) -> Value:
    """Let the main process make something, and give it, or its error, to all.

    Args:
        make: called in the main process alone.

    Raises:
        GlmtuneError: what ``make`` raised, in every process.
    """
    state = PartialState()
    found: list[Any] = [None, None]
    if state.is_main_process:
        try:
            found[0] = make()
        except GlmtuneError as error:
            if not is_distributed():
                raise
            found[1] = error
    if is_distributed():
        broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def check_same_settings(values: Any) -> None:
    """Make sure that all processes train with the same settings.

    Args:
        values: plain values, compared by their text.

    Raises:
        ConfigError: in every process, if they differ.
    """
    if not is_distributed():
        return
    texts = all_gather(repr(values))
    odd = [rank for rank, text in enumerate(texts) if text != texts[0]]
    if odd:
        raise ConfigError(
            f"Process {odd[0]} was started with other settings than process 0, but all must have the same. "
            "Start the machines with one and the same command; only `launch.node_rank` may differ."
        )


@contextmanager
def propagate_write_errors(
    what: str, errors: tuple[type[Exception], ...], group: Any = None
) -> Generator[None]:
    """Run a block that writes in every process; where it fails in one, it fails in all.

    Args:
        what: completes "process N could not".
        errors: the failures to share; others are raised at once.
        group: the process group to use; None: that of training.

    Raises:
        OSError: in every process, naming those that failed.
    """
    problem: Exception | None = None
    try:
        yield
    except errors as error:
        # After a lost connection there is nobody to tell: the gathering below would fail as well, later.
        if not is_distributed() or is_connection_lost(error):
            raise
        problem = error
    if not is_distributed():
        return
    report = None if problem is None else f"on {socket.gethostname()} could not {what}: {problem}"
    reports = all_gather(report, group)
    failed = [f"process {rank} {report}" for rank, report in enumerate(reports) if report is not None]
    if failed:
        raise OSError("; ".join(failed)) from problem


@contextmanager
def propagate_errors(group: Any = None) -> Generator[None]:
    """Run a block in every process; where one of our errors ends it in one, the others stop after it, too.

    Unlike `propagate_write_errors` the process that failed raises its own error, so that its user reads the
    whole of it, with the exit code of its kind.

    Args:
        group: the process group to use; None: that of training.

    Raises:
        GlmtuneError: what the block raised; TrainingError in the processes where it did not fail.
    """
    problem: GlmtuneError | None = None
    try:
        yield
    except GlmtuneError as error:
        problem = error
    reports = all_gather(None if problem is None else str(problem), group)
    if problem is not None:
        raise problem
    for rank, report in enumerate(reports):
        if report is not None:
            raise TrainingError(f"process {rank}: {report}")


def check_shared_storage(folder: Path) -> None:
    """Make sure that this process sees a folder which the main process has made.

    Raises:
        OSError: it does not.
    """
    if not folder.is_dir():
        raise OSError(
            f"{folder} is not there, but process 0 has made it: `output_dir` must lie on storage that all "
            "machines share"
        )


def is_connection_lost(error: BaseException) -> bool:
    """Tell whether an error means that another process has ended or does not answer."""
    name = type(error).__name__
    return name.startswith("Dist") or any(words in str(error) for words in LOST)
