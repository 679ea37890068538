"""Start a run on the machines of a hostfile, over ssh.

One ssh per machine runs the same command there with that machine's number in its settings; from then on each
is a launcher (`launch`), and this one only waits for all and stops the rest when one fails. It sends a line
to each every few seconds; where none comes any more, the part there stops (`parent`). DeepSpeed's own
launcher reads the same file, but needs DeepSpeed and pdsh on every machine; FSDP and plain runs have neither.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmtune.command_line import TYPED, typed_command
from glmtune.errors import ConfigError, TrainingError
from glmtune.signals import StoppedBySignal
from glmtune.training.distributed.launch import (
    OWN_PROGRAM,
    SAVING_SECONDS,
    SEVERAL_MACHINES_PORT,
    LaunchSettings,
)
from glmtune.training.distributed.parent import HEAD, HEAD_SECONDS

CONNECT_SECONDS = 10
STOP_SECONDS = 30
"""How long machines may take to end when another one has failed: there is nothing left to save then."""
# BatchMode: a password would be asked for on every machine at once; without one ssh fails, and we say so.
SSH = ("ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}")
Running = Sequence["subprocess.Popen[bytes]"]


@dataclass(frozen=True)
class Host:
    """A line of a hostfile.

    Attributes:
        name: as ssh knows it.
        slots: processes on it.
    """

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Read lines ``HOST slots=N``; empty ones and those that begin with # do not count.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line has another form or repeats a host.
    """
    rule = "each line must be `HOST slots=N`, N the number of GPUs to use (up to 9999), every host once"
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"`launch.hostfile` is `{path}`, which cannot be read ({error}). Name a file in which {rule}."
        ) from error
    found: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9][0-9]{0,3})", text)
        if match is None or match[1].startswith("-") or match[1] in found:
            raise ConfigError(f"`launch.hostfile`: {path}, line {number} is `{line.strip()}`, but {rule}.")
        found[match[1]] = Host(match[1], int(match[2]))
    if not found:
        raise ConfigError(f"`launch.hostfile` is `{path}`, which names no machine, but {rule}.")
    return list(found.values())


def launch_on_hosts(command: str, values: Mapping[str, Any], settings: LaunchSettings) -> int:
    """Run a command on all machines of a hostfile, to their end.

    Every machine needs this folder and this Python at the same places, and ssh without a password.

    Args:
        command: such as ``train``.
        values: all its settings, composed once; each machine gets them with its number in them.
        settings: hostfile, port and time-out are read.

    Returns:
        0, or 128 + the number of the signal that stopped the run after it had saved.

    Raises:
        ConfigError: the hostfile is wrong, a machine cannot be reached, or this one runs Windows.
        TrainingError: a machine's part failed; it has said why, and the others were stopped.
    """
    if os.name == "nt":
        raise ConfigError(
            f"`launch.hostfile` is `{settings.hostfile}`, but its machines are started by a line for a Unix "
            "shell, with Python and this folder at the same places as here, and this is Windows. Start each "
            "machine yourself, with `launch.num_nodes`, `launch.node_rank` and `launch.master_addr`."
        )
    hosts = read_hostfile(Path(str(settings.hostfile)))
    if shutil.which("ssh") is None:
        raise ConfigError(
            f"`launch.hostfile` is `{settings.hostfile}`, but the program ssh is not installed here. Install "
            "it, or start each machine yourself with `launch.num_nodes` and `launch.node_rank`."
        )
    _check_reachable(hosts)
    running: list[subprocess.Popen[bytes]] = []
    try:
        for rank, host in enumerate(hosts):
            # -tt, a terminal: when this ssh ends, the system there hangs up and its processes end, too.
            words = [
                *SSH,
                "-tt",
                "-o",
                "EscapeChar=none",
                host.name,
                _remote(command, values, settings, hosts, rank),
            ]
            running.append(subprocess.Popen(words, stdin=subprocess.PIPE))
        return _watch(running, hosts)
    finally:
        _end(running, signal.SIGTERM, STOP_SECONDS)


def _check_reachable(hosts: Sequence[Host]) -> None:
    trials = [
        subprocess.Popen([*SSH, host.name, "true"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for host in hosts
    ]
    for host, trial in zip(hosts, trials, strict=True):
        try:
            _, said = trial.communicate(timeout=2 * CONNECT_SECONDS)
        except subprocess.TimeoutExpired:
            trial.kill()
            said = b"no answer"
        if trial.returncode != 0:
            text = said.decode(errors="replace").strip().splitlines()
            raise ConfigError(
                f"`launch.hostfile` names `{host.name}`, which cannot be reached by `ssh {host.name}` "
                f"without a password ({text[-1] if text else 'no reason given'}). Correct the name, or give "
                "that machine your key with `ssh-copy-id`."
            )


def _remote(
    command: str, values: Mapping[str, Any], settings: LaunchSettings, hosts: Sequence[Host], rank: int
) -> str:
    """Return the shell line that runs one machine's part."""
    place = {
        "num_processes": hosts[rank].slots,
        "num_nodes": len(hosts),
        "node_rank": rank,
        "master_addr": hosts[0].name if len(hosts) > 1 else "127.0.0.1",
        "master_port": settings.master_port or (SEVERAL_MACHINES_PORT if len(hosts) > 1 else None),
        "hostfile": None,
    }
    own = {**values, "launch": {**values["launch"], **place}}
    # As base64: settings may hold quotes and line ends, which the shells here and there would read their way.
    code = base64.b64encode(json.dumps(own).encode()).decode()
    program, folder = shlex.join([sys.executable, *OWN_PROGRAM]), shlex.quote(str(Path.cwd()))
    return (
        # What the head sends (see `parent`) should not be shown as typed. Not every ssh gives a terminal.
        f"stty -echo 2>/dev/null; cd {folder} && f=$(mktemp) && printf %s {code} | base64 -d > $f && "
        f"{HEAD}=1 {TYPED}={shlex.quote(typed_command())} {program} {command} --settings $f; "
        "c=$?; rm -f $f; exit $c"
    )


def _watch(running: Running, hosts: Sequence[Host]) -> int:
    """Wait for all machines; stop the rest when one fails.

    Returns:
        0, or 128 + the number of the signal that stopped a machine's part after it had saved.
    """
    next_line = time.monotonic()
    try:
        while None in (codes := [process.poll() for process in running]):  # all are asked, not the first only
            if any(code not in (None, 0) for code in codes):
                break
            if time.monotonic() >= next_line:
                _send_line(running)
                next_line += HEAD_SECONDS
            time.sleep(0.2)
    except KeyboardInterrupt as stop:
        number = signal.Signals(stop.number) if isinstance(stop, StoppedBySignal) else signal.SIGINT
        _end(running, number, SAVING_SECONDS)
        return 128 + number
    _end(running, signal.SIGTERM, STOP_SECONDS)
    failed = [(host, code) for host, code in zip(hosts, codes, strict=True) if code]  # not those just stopped
    if not failed:
        return 0
    host, code = failed[0]
    if code > 128:
        return code
    raised = ConfigError if code == 2 else TrainingError
    raise raised(
        f"The part of `{host.name}` ended with code {code}; the other machines were stopped. See above."
    )


def _send_line(running: Running) -> None:
    """Tell all machines that the head is there."""
    for process in running:
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # its ssh has just ended
            process.stdin.write(b"\n")
            process.stdin.flush()


def _end(running: Running, number: signal.Signals, seconds: float) -> None:
    for process in running:
        if process.poll() is None:
            process.send_signal(number)
    deadline = time.monotonic() + seconds
    for process in running:
        try:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
