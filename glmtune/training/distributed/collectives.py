"""What the processes of a run must do or know at the same time."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from glmtune.errors import ConfigError, GlmtuneError, TrainingError

Known = TypeVar("Known")
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout", "Timed out")
"""What the collectives of PyTorch say when another process has ended or does not answer."""


def join(device: torch.device, timeout_seconds: int) -> PartialState:
    """Connect to the other processes of this run, if there are any.

    Args:
        device: where training will run.
        timeout_seconds: how long to wait for the others, now and at every later exchange.

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


def is_several() -> bool:
    """Tell whether this run has more than one process."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def is_first() -> bool:
    """Tell whether this process is number 0."""
    return not is_several() or torch.distributed.get_rank() == 0


def wait() -> None:
    """Wait until every process has come here."""
    if is_several():
        torch.distributed.barrier()


def second_group(timeout_seconds: float) -> Any:
    """Connect the processes once more, for threads that talk beside training; None for a single process."""
    if not is_several():
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))


def gathered(value: Known, group: Any = None) -> list[Known]:
    """Return what each process brought, by rank.

    Args:
        value: of this process.
        group: the connections to use; None: those of training.
    """
    if not is_several():
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value, group=group)
    return found


def of_first(make: Any) -> Any:
    """Let the first process make something, and give it, or its error, to all.

    Args:
        make: called in the first process alone.

    Raises:
        GlmtuneError: what ``make`` raised, in every process.
    """
    state = PartialState()
    found: list[Any] = [None, None]
    if state.is_main_process:
        try:
            found[0] = make()
        except GlmtuneError as error:
            if not is_several():
                raise
            found[1] = error
    if is_several():
        broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def check_same(values: Any) -> None:
    """Make sure that all processes train with the same settings.

    Args:
        values: plain values, compared by their text.

    Raises:
        ConfigError: in every process, if they differ.
    """
    if not is_several():
        return
    texts = gathered(repr(values))
    odd = [rank for rank, text in enumerate(texts) if text != texts[0]]
    if odd:
        raise ConfigError(
            f"Process {odd[0]} was started with other settings than process 0, but all must have the same. "
            "Start the machines with one and the same command; only `launch.node_rank` may differ."
        )


@contextmanager
def agreed(what: str, errors: tuple[type[Exception], ...], group: Any = None) -> Iterator[None]:
    """Run a block in every process; where it fails in one, it fails in all.

    Args:
        what: completes "process N could not".
        errors: the failures to share; others are raised at once.
        group: the connections to use; None: those of training.

    Raises:
        OSError: in every process, naming those that failed.
    """
    problem: Exception | None = None
    try:
        yield
    except errors as error:
        if not is_several() or is_lost(error):
            raise
        problem = error
    if not is_several():
        return
    report = None if problem is None else f"on {socket.gethostname()} could not {what}: {problem}"
    reports = gathered(report, group)
    failed = [f"process {rank} {report}" for rank, report in enumerate(reports) if report is not None]
    if failed:
        raise OSError("; ".join(failed)) from problem


@contextmanager
def all_or_none(group: Any = None) -> Iterator[None]:
    """Run a block in every process; where it fails in one, the others do not go on to wait for it.

    Args:
        group: the connections to use; None: those of training.

    Raises:
        GlmtuneError: what the block raised; TrainingError in the processes where it did not fail.
    """
    problem: GlmtuneError | None = None
    try:
        yield
    except GlmtuneError as error:
        problem = error
    reports = gathered(None if problem is None else str(problem), group)
    if problem is not None:
        raise problem
    for rank, report in enumerate(reports):
        if report is not None:
            raise TrainingError(f"process {rank}: {report}")


def check_shared(folder: Path) -> None:
    """Make sure that this process sees a folder which the first one has made.

    Raises:
        OSError: it does not.
    """
    if not folder.is_dir():
        raise OSError(
            f"{folder} is not there, but process 0 has made it: `output_dir` must lie on storage that all "
            "machines share"
        )


def is_lost(error: BaseException) -> bool:
    """Tell whether an error means that another process has ended or does not answer."""
    name = type(error).__name__
    return name.startswith("Dist") or any(words in str(error) for words in LOST)
