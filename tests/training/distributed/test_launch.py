"""Starting processes: what is wrong with port, hosts or settings is said once, by one voice, and nothing hangs."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from glmtune.cli import main
from glmtune.errors import ConfigError, TrainingError
from glmtune.training.distributed import hosts, launch, start
from glmtune.training.distributed.launch import LaunchSettings, Node

ALONE = {"num_nodes": 1, "master_addr": "127.0.0.1", "timeout_seconds": 30}


@pytest.fixture
def taken_port() -> Any:
    """A port that somebody else listens on."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


def test_port_in_use(taken_port: int, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overrides = ["+recipe=full", f"output_dir={tmp_path / 'run'}", "launch.num_processes=2"]
    assert main(["train", *overrides, f"launch.master_port={taken_port}"]) == 2
    said = capsys.readouterr().err
    intention, problem = said.splitlines()
    assert intention.startswith("Tuning of all weights of glm-tiny")
    assert problem.startswith(f"glmtune: `launch.master_port` is {taken_port}, but that port cannot be used")
    assert not (tmp_path / "run").exists()


def test_free_port_is_chosen() -> None:
    node = launch.node_of(LaunchSettings(), 2)
    assert (node.num_processes, node.rank, node.master_addr) == (2, 0, "127.0.0.1")
    launch.check_port(node.master_port)


def test_one_error_of_several_processes(tmp_path: Path) -> None:
    node = Node(rank=0, num_processes=2, master_port=launch.free_port(), **ALONE)
    with pytest.raises(ConfigError) as caught:
        launch.launch("train", {"tunee": "full"}, node)
    assert "`tunee` is no setting. Did you mean `tune`?" in str(caught.value)
    assert "Traceback" in str(caught.value.__notes__)
    assert launch.LAUNCHED not in os.environ


class Failure:
    """As torch describes a process that failed."""

    def __init__(self, rank: int, exitcode: int, text: str = "", timestamp: int = 5) -> None:
        self.local_rank, self.exitcode, self.timestamp = rank, exitcode, timestamp
        self.message: Any = {"message": text, "extraInfo": {}} if text else "To enable traceback see"

    def signal_name(self) -> str:
        return "SIGKILL"


LOST = f"This process {launch.PARTNER_LOST} at step 3"


@pytest.mark.parametrize(
    ("failures", "kind", "words"),
    [
        (
            [Failure(0, 1, LOST, 1), Failure(1, -9)],
            TrainingError,
            "Process 1 of this machine was killed by SIGKILL",
        ),
        ([Failure(0, 1, LOST, 1), Failure(1, 1, "no data", 2)], TrainingError, "process 1: no data"),
        ([Failure(0, 2, "bad setting"), Failure(1, 2, "bad setting")], ConfigError, "bad setting"),
        ([Failure(0, -15), Failure(1, 1, "no data")], TrainingError, "no data"),
        ([Failure(0, -9, "", 9), Failure(1, 1, "no data", 2)], TrainingError, "no data"),
        ([Failure(0, 1)], TrainingError, "ended with code 1 and said:\nboom"),
    ],
)
def test_the_one_to_blame_speaks(failures: list[Any], kind: type, words: str, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "stderr.log").write_text("boom\n")
    with pytest.raises(kind) as caught:
        launch._failed(failures, tmp_path)
    assert words in str(caught.value)


def test_a_run_stopped_by_a_signal_is_no_failure(tmp_path: Path) -> None:
    assert launch._failed([Failure(0, 143), Failure(1, 143)], tmp_path) == 143


def test_processes_that_went_back_are_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [[Failure(0, 75), Failure(1, -15)], [Failure(0, -9), Failure(1, 75)], []]
    settings: list[Any] = []

    def start(config: Any, python: str) -> Any:
        def run(*words: str) -> None:
            settings.append(json.loads(Path(words[-1]).read_text()))
            if failures := outcomes.pop(0):
                error = ChildFailedError.__new__(ChildFailedError)
                error.failures = dict(enumerate(failures))  # type: ignore[arg-type]
                raise error

        return run

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", start)
    node = Node(0, 1, 2, "127.0.0.1", launch.free_port(), timeout_seconds=5)
    assert launch.launch("train", {"resume": "never", "seed": 3}, node) == 0
    assert settings == [{"resume": resume, "seed": 3} for resume in ("never", "auto", "auto")]
    outcomes.extend([[Failure(0, 75), Failure(1, 75)], [Failure(0, 1, "did not help"), Failure(1, 1)]])
    with pytest.raises(TrainingError, match="did not help"):
        launch.launch("train", {"resume": "auto"}, node)


def test_processes_are_told_the_command_that_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def start(config: Any, python: str) -> Any:
        return lambda *words: told.append(os.environ["GLMTUNE_COMMAND"])

    monkeypatch.delenv("GLMTUNE_COMMAND", raising=False)
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", start)
    monkeypatch.setattr(sys, "argv", ["/bin/glmtune", "train", "model=my model", "endpoint.api_key=abc"])
    node = Node(0, 1, 2, "127.0.0.1", launch.free_port(), timeout_seconds=5)
    assert launch.launch("train", {"seed": 3}, node) == 0
    assert "GLMTUNE_COMMAND" not in os.environ, "the next command of this process is another one"
    monkeypatch.setenv("GLMTUNE_COMMAND", "glmtune train launch.hostfile=hosts")  # told by the head, over ssh
    assert launch.launch("train", {"seed": 3}, node) == 0
    assert told == [
        "glmtune train 'model=my model' 'endpoint.api_key=***'",
        "glmtune train launch.hostfile=hosts",
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("node0 slots=8\nnode1 slots=eight\n", ["line 2", "node1 slots=eight", "HOST slots=N"]),
        ("node0 slots=8\n\nnode0 slots=8 # again\n", ["line 3", "every host once"]),
        ("-oProxyCommand=x slots=1\n", ["line 1"]),
        ("node0 slots=100000000000000000000\n", ["line 1", "up to 9999"]),
        (f"node0 slots={'9' * 5000}\n", ["line 1", "up to 9999"]),
        ("# nobody\n", ["names no machine"]),
        (None, ["cannot be read"]),
    ],
)
def test_wrong_hostfile(
    content: str | None, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hosts"
    if content is not None:
        file.write_text(content)
    assert main(["train", "+recipe=full", f"launch.hostfile={file}"]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in [*words, str(file)]), said


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ssh that runs the line here, for `node*`, and knows no other host."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "ssh"
    script.write_text(
        "#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done\nhost=$1; shift\n"
        'case $host in node*) exec bash -c "$*" ;; esac\n'
        'echo "ssh: Could not resolve hostname $host" >&2; exit 255\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return script


def test_host_that_cannot_be_reached(fake_ssh: Path, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("node0 slots=1\nelsewhere slots=1\n")
    with pytest.raises(ConfigError, match=r"names `elsewhere`.*Could not resolve.*ssh-copy-id"):
        hosts.launch_on_hosts("train", {"launch": {}}, LaunchSettings(hostfile=str(file)))


def test_every_host_gets_its_part(fake_ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, python = tmp_path / "hosts", tmp_path / "python"
    file.write_text("node0 slots=2\nnode1 slots=1\n")
    python.write_text(
        f'#!/bin/bash\ncp "$5" {tmp_path}/part-$$.json\necho "$GLMTUNE_COMMAND" >> {tmp_path}/typed\n'
    )
    monkeypatch.delenv("GLMTUNE_COMMAND", raising=False)
    monkeypatch.setattr(sys, "argv", ["glmtune", "train", "output_dir=it's mine"])
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    settings = LaunchSettings(hostfile=str(file), master_port=1234)
    assert hosts.launch_on_hosts("train", {"seed": 7, "launch": {"timeout_seconds": 9}}, settings) == 0
    parts = sorted((json.loads(part.read_text()) for part in tmp_path.glob("part-*")), key=str)
    assert (tmp_path / "typed").read_text() == "glmtune train 'output_dir=it'\"'\"'s mine'\n" * 2
    common = {
        "timeout_seconds": 9,
        "num_nodes": 2,
        "master_addr": "node0",
        "master_port": 1234,
        "hostfile": None,
    }
    assert sorted(parts, key=lambda part: part["launch"]["node_rank"]) == [
        {"seed": 7, "launch": {**common, "num_processes": 2, "node_rank": 0}},
        {"seed": 7, "launch": {**common, "num_processes": 1, "node_rank": 1}},
    ]


@pytest.mark.parametrize(("code", "kind"), [(2, ConfigError), (1, TrainingError)])
def test_a_host_that_fails_stops_the_others(
    code: int, kind: type, fake_ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, python = tmp_path / "hosts", tmp_path / "python"
    file.write_text("node0 slots=1\nnode1 slots=1\n")
    python.write_text(f'#!/bin/bash\ngrep -q \'"node_rank": 1\' "$5" && exit {code}\nexec sleep 60\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(kind, match="part of `node1` ended with code"):
        hosts.launch_on_hosts("train", {"launch": {}}, LaunchSettings(hostfile=str(file)))


def test_machines_that_do_not_come_together() -> None:
    node = Node(
        rank=1,
        num_nodes=2,
        num_processes=1,
        master_addr="127.0.0.1",
        master_port=launch.free_port(),
        timeout_seconds=2,
    )
    with pytest.raises(TrainingError, match=r"2 machines of this run did not come together.*2 seconds"):
        launch.launch("train", {}, node)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_processes": 0}, "launch.num_processes"),
        ({"num_nodes": 2, "node_rank": 2}, "launch.node_rank"),
        ({"num_nodes": 2, "node_rank": 1}, "must reach machine 0"),
        ({"num_nodes": 2, "hostfile": "hosts"}, "a hostfile names the machines itself"),
        ({"master_port": 70000}, "launch.master_port"),
    ],
)
def test_settings_that_contradict(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LaunchSettings(**values)


def test_one_process_needs_no_launcher() -> None:
    assert start.start("train", {}, LaunchSettings(), device="cpu", always=False) is None


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launch.num_processes(LaunchSettings(), "auto") == 4
    assert launch.num_processes(LaunchSettings(), "cpu") == 1
    with pytest.raises(ConfigError, match="is 8, but this machine has 4 GPUs"):
        launch.num_processes(LaunchSettings(num_processes=8), "cuda")


def test_stored_settings_are_taken_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--settings", str(tmp_path / "none.yaml")]) == 2
    assert "`--settings` must be followed by a file" in capsys.readouterr().err
    file = tmp_path / "config.yaml"
    file.write_text("trainer: {learning_rat: 1}\n")
    assert main(["train", "--settings", str(file)]) == 2
    assert "Did you mean `trainer.learning_rate`?" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--local_rank=0", "--local-rank=3"])
def test_what_launchers_put_in_front_of_the_command_is_no_command(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`deepspeed --module glmtune train` calls `python -m glmtune --local_rank=0 train`."""
    from glmtune.cli import main

    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main([word, "train", "--help"]) == 0
    assert "usage: glmtune train" in capsys.readouterr().out
    monkeypatch.delenv("LOCAL_RANK")
    assert main([word, "train", "--help"]) == 2
