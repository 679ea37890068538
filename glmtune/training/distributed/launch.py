"""Start this machine's processes of a run, and make one outcome of how they end.

    glmtune train            the launcher: composes the settings once, starts and waits
      process 0..N-1         `python -m glmtune train --settings FILE`, with RANK and WORLD_SIZE set

torch's elastic agent does the starting: it hands out ranks, connects machines over one port of machine 0, and
when a process fails it stops the others. Ours are the choice of port and number, and the words at the end.

Signals: Ctrl-C, SIGTERM and SIGHUP reach the launcher, which passes them on. A process told to stop saves and
ends with 128 + the signal's number, as does the launcher. When the launcher is killed, its processes end at
once (`parent`). One that ends with code 75 (`StartAnewError`, EX_TEMPFAIL of sysexits.h) asks to be started
anew: a run whose weights are sharded cannot go back to a checkpoint in place.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtune.command_line import TYPED, typed_command
from glmtune.errors import ConfigError, StartAnewError, TrainingError
from glmtune.settings import check_range, setting
from glmtune.signals import stopping_signals
from glmtune.training.distributed.parent import LAUNCHED

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

OWN_PROGRAM = ("-P", str(Path(__file__).resolve().parents[2] / "__main__.py"))
"""What Python runs in our processes: by its path and without the working folder (-P), so that no `glmtune.py`
or `datasets.py` of the user's is taken for the package or for a library."""
SEVERAL_MACHINES_PORT = 29500
"""torchrun's default: machines cannot agree on a free port before they are connected, so it must be known."""
KILLED: int = getattr(signal, "SIGKILL", 9)
"""Windows has no such signal, and ends processes with a code of their own."""
SAVING_SECONDS = 1800
"""How long processes told to stop may take to save: a large checkpoint over a network takes minutes."""


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """How many processes train together, and where."""

    num_processes: int | None = setting(None, "processes on this machine; null: one per GPU")
    num_nodes: int = setting(1, "machines; each runs the command with its own node_rank, or see hostfile")
    node_rank: int = setting(0, "number of this machine, from 0")
    master_addr: str = setting("127.0.0.1", "name or address of machine 0, as the others reach it")
    master_port: int | None = setting(None, "a free port of machine 0; null: any, 29500 for several machines")
    hostfile: str | None = setting(None, "file of lines `HOST slots=N`: all are started from here, over ssh")
    timeout_seconds: int = setting(1800, "how long processes wait for each other before they give up")

    def __post_init__(self) -> None:
        """Check what needs no machine.

        Raises:
            ConfigError: a number is out of range, or settings contradict each other.
        """
        if self.num_processes is not None:
            check_range("launch.num_processes", self.num_processes, low=1)
        check_range("launch.num_nodes", self.num_nodes, low=1)
        check_range("launch.node_rank", self.node_rank, low=0, high=self.num_nodes - 1)
        check_range("launch.timeout_seconds", self.timeout_seconds, low=1)
        if self.master_port is not None:
            check_range("launch.master_port", self.master_port, low=1, high=65535)
        if self.hostfile is not None and self.num_nodes > 1:
            raise ConfigError(
                f"`launch.hostfile` is `{self.hostfile}` and `launch.num_nodes` is {self.num_nodes}, but a "
                "hostfile names the machines itself. Leave num_nodes and node_rank out."
            )
        if self.num_nodes > 1 and self.master_addr in ("127.0.0.1", "localhost") and self.node_rank > 0:
            raise ConfigError(
                f"`launch.master_addr` is `{self.master_addr}`, but machine {self.node_rank} of "
                f"{self.num_nodes} must reach machine 0 by it. Give machine 0's name or address."
            )


@dataclass(frozen=True)
class Node:
    """What one machine contributes.

    Attributes:
        rank: its number, from 0.
        num_nodes: machines in all.
        num_processes: processes on it.
        master_addr: address of machine 0.
        master_port: port of machine 0.
        timeout_seconds: how long it waits for the other machines.
    """

    rank: int
    num_nodes: int
    num_processes: int
    master_addr: str
    master_port: int
    timeout_seconds: int


def num_processes(settings: LaunchSettings, device: str) -> int:
    """Return how many processes this machine runs: as set, else one per CUDA GPU, else one.

    Args:
        settings: ``num_processes`` is read.
        device: the setting ``model.device``; ``cpu`` and ``cuda:N`` are one place.

    Raises:
        ConfigError: more processes than GPUs, or several on an accelerator that is no CUDA GPU.
    """
    from glmtune.models.devices import count_devices, training_device

    kind = training_device("auto").type if device == "auto" else device.partition(":")[0]
    if kind in ("npu", "xpu", "mps") and (settings.num_processes or 1) > 1:
        raise ConfigError(
            f"`launch.num_processes` is {settings.num_processes}, but several processes train on CUDA GPUs "
            f"or on the CPU only, and this run is on {kind.upper()}. Leave it out, or add `model.device=cpu`."
        )
    num_gpus = count_devices("cuda") if kind == "cuda" and ":" not in device else 0
    if settings.num_processes is None:
        return max(1, num_gpus)
    if 0 < num_gpus < settings.num_processes:
        raise ConfigError(
            f"`launch.num_processes` is {settings.num_processes}, but this machine has {num_gpus} GPUs, and "
            "each process needs one of its own. Lower it, or leave it out."
        )
    return settings.num_processes


def node_of(settings: LaunchSettings, count: int) -> Node:
    """Describe this machine's part, with a port that is free.

    Args:
        settings: the user's.
        count: processes on this machine.

    Raises:
        ConfigError: this is machine 0 and the port is taken.
    """
    is_alone = settings.num_nodes == 1
    port = settings.master_port or (free_port() if is_alone else SEVERAL_MACHINES_PORT)
    if settings.node_rank == 0:
        check_port(port)
    address = "127.0.0.1" if is_alone else settings.master_addr
    return Node(
        settings.node_rank, settings.num_nodes, count, address, port, timeout_seconds=settings.timeout_seconds
    )


def free_port() -> int:
    """Return a port that nobody listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Make sure that we can listen on a port.

    Raises:
        ConfigError: another program has it, or the system does not allow it.
    """
    with closing(socket.socket()) as probe:
        # As torch's store will: without it a port that an ended run has just left counts as taken for a
        # minute.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"`launch.master_port` is {port}, but that port cannot be used here ({error.strerror}): each "
                "run needs one of its own. Name another one, or leave it out on a single machine: a free one "
                "is then chosen."
            ) from error


def launch(command: str, values: Mapping[str, Any], node: Node) -> int:
    """Run this machine's processes of a command to their end.

    Args:
        command: such as ``train``.
        values: all its settings, composed once; every process reads the same file.
        node: this machine's part.

    Returns:
        0, or 128 + the number of the signal that stopped the run after it had saved.

    Raises:
        ConfigError: of a process, or TrainingError: the first that failed says why; the others were stopped.
    """
    while (code := _launch_once(command, values, node)) == StartAnewError.exit_code:
        values = {**values, "resume": "auto"}  # from the checkpoint to which the run went back
        gc.collect()  # so that the port is free again
    return code


def _launch_once(command: str, values: Mapping[str, Any], node: Node) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent logs each failure with a table of all processes; we word it ourselves.
    for name in ("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp(prefix="glmtune-"))
    (folder / "settings.json").write_text(json.dumps(values), encoding="utf-8")
    # One process of the whole run speaks to the terminal; the others write to files, for when they fail.
    first = 0 if node.rank == 0 else -1
    quiet = {rank: Std.ALL for rank in range(node.num_processes) if rank != first}
    # By itself each process would take a thread for every core, and they would be in each other's way.
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // node.num_processes)))
    if sys.platform == "win32":
        # The library behind torch's faster store is in no build for Windows, where asking for it is an error.
        os.environ.setdefault("USE_LIBUV", "0")
    os.environ[LAUNCHED] = str(os.getpid())
    is_first = TYPED not in os.environ  # a launcher that was started over ssh has the head's
    os.environ[TYPED] = typed_command()
    config = LaunchConfig(
        min_nodes=node.num_nodes,
        max_nodes=node.num_nodes,
        nproc_per_node=node.num_processes,
        run_id="glmtune",
        rdzv_backend="static",  # machines know their number beforehand, so nothing has to be negotiated
        rdzv_endpoint=f"{node.master_addr}:{node.master_port}",
        rdzv_configs={"rank": node.rank, "timeout": node.timeout_seconds},
        max_restarts=0,  # the same command goes on from the newest checkpoint, when whatever failed is mended
        shutdown_timeout=SAVING_SECONDS,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=quiet or Std.NONE),
        **_signals_passed_on(LaunchConfig),
    )
    words = [*OWN_PROGRAM, command, "--settings", str(folder / "settings.json")]
    try:
        elastic_launch(config, sys.executable)(*words)
    except ChildFailedError as error:
        return _failed(list(error.failures.values()), folder)
    except SignalException as error:
        return 128 + int(error.sigval)
    except Exception as error:  # of the rendezvous: torch raises many kinds
        raise TrainingError(_unreached(node, error)) from error
    finally:
        os.environ.pop(LAUNCHED, None)
        if is_first:
            os.environ.pop(TYPED, None)
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _signals_passed_on(config: type) -> dict[str, Any]:
    """Leave SIGHUP alone under `nohup`; an older torch cannot be told which signals to pass on."""
    if "signals_to_handle" not in {field.name for field in dataclasses.fields(config)}:
        return {}
    numbers = (*stopping_signals(), signal.SIGINT, getattr(signal, "SIGQUIT", signal.SIGTERM))
    return {"signals_to_handle": ",".join(dict.fromkeys(signal.Signals(number).name for number in numbers))}


def _unreached(node: Node, error: Exception) -> str:
    return (
        f"The {node.num_nodes} machines of this run did not come together at "
        f"{node.master_addr}:{node.master_port} within {node.timeout_seconds} seconds ({error}). Check that "
        "all of them were started, that `launch.master_addr` and `launch.master_port` name machine 0, "
        "and that no firewall stands between."
    )


def _failed(failures: Sequence[ProcessFailure], folder: Path) -> int:
    """Turn the processes' ends into one outcome: the error of the one to blame, a stop, or once more."""
    if any(failure.exitcode == StartAnewError.exit_code for failure in failures):
        return StartAnewError.exit_code  # the others were stopped on their way to the same end
    worst = min(failures, key=_blame)
    if worst.exitcode > 128:  # stopped by a signal, after saving
        return worst.exitcode
    rank = worst.local_rank
    text, trace = _told(worst)
    if worst.exitcode < 0:
        text = (
            f"Process {rank} of this machine was killed by {worst.signal_name()} (often the system's answer "
            "to a lack of memory), and the others were stopped. The newest complete checkpoint is intact; "
            "the same command goes on from there."
        )
    elif not text:
        said = _tail(folder, rank)
        text = f"Process {rank} of this machine ended with code {worst.exitcode} and said:\n{said}"
    elif rank and text not in [_told(failure)[0] for failure in failures if not failure.local_rank]:
        text = f"process {rank}: {text}"  # else it is the first one's, which all have got
    raised = (ConfigError if worst.exitcode == 2 else TrainingError)(text)
    if trace:
        raised.add_note(trace)
    raise raised


def _blame(failure: ProcessFailure) -> tuple[int, int, int]:
    """Order failures: the lower, the likelier it is what the others only follow from.

    When one process fails, the others lose their connection to it, or the launcher stops them (SIGTERM, then
    SIGKILL). Which of them ended first by the clock says little: the cause may take longer to end than those
    that only noticed.
    """
    is_stopped = failure.exitcode in (-signal.SIGTERM, -KILLED)
    if PARTNER_LOST in _told(failure)[0]:
        group = 3
    elif failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM):
        group = 4  # by the launcher, when another one had failed
    else:
        group = 2 if is_stopped else 1  # a kill may be the launcher's last word, or the system's
    return group, failure.timestamp, failure.local_rank


PARTNER_LOST = "lost the other processes"
"""Words of the error of a process whose partner ended; it is never the one to blame."""


def _told(failure: ProcessFailure) -> tuple[str, str]:
    """Return the message a process left, and its stack trace."""
    message = failure.message
    if isinstance(message, dict):
        return str(message.get("message", "")), str(message.get("extraInfo", {}).get("py_callstack", ""))
    return "", ""


def _tail(folder: Path, rank: int, lines: int = 15) -> str:
    found = sorted(folder.rglob(f"{rank}/stderr.log"))
    text = found[-1].read_text(encoding="utf-8", errors="replace") if found else ""
    return "\n".join(text.strip().splitlines()[-lines:]) or "nothing"


def record_failure(text: str, trace: str) -> bool:
    """Leave an error for the launcher, if ours started this process.

    Args:
        text: what the user should read.
        trace: the stack trace, shown with ``--debug``.

    Returns:
        Whether the launcher will show it.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if LAUNCHED not in os.environ or not file:
        return False
    info = {"timestamp": str(int(time.time())), "py_callstack": trace}
    content = {"message": {"message": text, "extraInfo": info}}
    Path(file).write_text(json.dumps(content), encoding="utf-8")
    return True
