"""What the pages on installing and on clusters say can be typed: scripts and their Python forms are one, jobs compose."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from glmtune.cli import COMMANDS
from recipes.words.compose import load_settings
from recipes.words.reading import read_words

REPO = Path(__file__).resolve().parents[2]
INSTALL = (REPO / "docs" / "install.md").read_text(encoding="utf-8")
CLUSTERS = (REPO / "docs" / "slurm_kubernetes.md").read_text(encoding="utf-8")
PAIRS = re.findall(r"```bash\n([^`]*? bash scripts/[^`]*?)```\n\n```text\n(.*?)```", INSTALL, flags=re.DOTALL)
BATCHES = re.findall(r"```bash\n(#!/bin/bash.*?)```", CLUSTERS, flags=re.DOTALL)
MANIFESTS: list[dict[str, Any]] = [
    each
    for block in re.findall(r"```yaml\n(.*?)```", CLUSTERS, flags=re.DOTALL)
    for each in yaml.safe_load_all(block)
]
COMPOSE: dict[str, Any] = yaml.safe_load((REPO / "compose.yaml").read_text(encoding="utf-8"))
# Takes the place of every program that a script starts: its words go to a file.
FAKE = """#!/bin/sh
"{python}" - "$0" "$@" <<'END'
import json, sys
with open("{record}", "a", encoding="utf-8") as file:
    file.write(json.dumps([sys.argv[1].rpartition("/")[2], *sys.argv[2:]]) + "\\n")
END
"""


def settings(words: Sequence[str]) -> Any:
    """Return the settings of a command, composed and checked; `words` begin with its name."""
    command = importlib.import_module(COMMANDS[words[0]][0]).COMMAND
    return load_settings(command, read_words(words[1:], command).overrides)


@pytest.fixture
def recorded(tmp_path: Path):
    """Run a line of bash where `glmtune` and `srun` only write down what they are called with."""
    programs, record = tmp_path / "programs", tmp_path / "record"
    programs.mkdir()
    for name in ("glmtune", "nvidia-smi", "scontrol"):
        (programs / name).write_text(FAKE.format(python=sys.executable, record=record))
        (programs / name).chmod(0o755)
    (programs / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (programs / "scontrol").write_text("#!/bin/sh\n[ $1 = show ] && printf 'node0\\nnode1\\n'\n")
    for name in ("srun", "scontrol"):
        (programs / name).chmod(0o755)
    (tmp_path / "scripts").symlink_to(REPO / "scripts")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()

    def run(line: str, **variables: str) -> list[list[str]]:
        ours = ("LR", "MODEL", "NUM_GPUS", "DATA", "RUN")
        clean = {name: text for name, text in os.environ.items() if name not in ours and name[:6] != "SLURM_"}
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env={**clean, "PATH": f"{programs}:{os.environ['PATH']}", **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
        record.unlink(missing_ok=True)
        return [json.loads(each)[1:] for each in lines if json.loads(each)[0] == "glmtune"]

    return run


def test_every_counterpart_has_its_pair() -> None:
    shown = {re.findall(r"scripts/(\w+)\.sh", line)[0] for line, _ in PAIRS}
    assert shown == {"train_ptuning", "train_chat", "ds_train_finetune", "evaluate", "quickstart"}


@pytest.mark.parametrize(
    ("line", "same"), PAIRS, ids=[re.findall(r"(\w+)\.sh", line)[0] for line, _ in PAIRS]
)
def test_a_script_is_its_python_form(line: str, same: str, recorded, tmp_path: Path) -> None:
    (tmp_path / "runs" / "adgen" / "checkpoint-3000").mkdir(parents=True)
    # The quickstart's script goes to its own folder first, and would take the environment there.
    variables = {"SKIP_SETUP": "1", "VIRTUAL_ENV": str(tmp_path)}
    (tmp_path / "bin").symlink_to(tmp_path / "programs")
    ran = recorded(line.strip(), **variables)
    written = [shlex.split(each) for each in same.strip().splitlines()]
    assert all(words[:3] == ["python", "-m", "glmtune"] for words in written)
    assert len(ran) == len(written)
    for by_script, by_python in zip(ran, written, strict=True):
        assert by_script[0] == by_python[3]
        assert settings(by_script) == settings(by_python[3:])


def test_variables_are_the_settings_that_the_page_names(recorded) -> None:
    [words] = recorded(
        "HOSTFILE=hosts MASTER_ADDR=node0 MASTER_PORT=29501 bash scripts/ds_train_finetune.sh", NNODES="1"
    )
    assert {"launch.hostfile=hosts", "launch.master_addr=node0", "launch.master_port=29501"} <= set(words)
    [words] = recorded("NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 bash scripts/ds_train_finetune.sh")
    assert {"launch.num_nodes=2", "launch.node_rank=1"} <= set(words)


def test_the_page_says_what_the_other_scripts_run() -> None:
    setup = (REPO / "scripts" / "setup.sh").read_text(encoding="utf-8")
    assert re.search(r"torch==[\d.]+", setup)[0] in INSTALL  # type: ignore[index]
    for word in (".[dev,docs,deepspeed,web]", "requirements-ci.lock", "LOCKED"):
        assert word in setup
        assert word in INSTALL
    for script, command in (("test.sh", "scripts/audit.py"), ("gpu_check.sh", "benchmarks.gpu.check")):
        assert command in (REPO / "scripts" / script).read_text(encoding="utf-8")
        assert command in INSTALL


# ---- Slurm


def test_there_are_jobs() -> None:
    assert len(BATCHES) == 3
    assert {each["kind"] for each in MANIFESTS} == {"PersistentVolumeClaim", "Job", "Service", "Deployment"}


@pytest.mark.parametrize("number", range(len(BATCHES)), ids=["full", "lora", "evaluations"])
def test_a_batch_script_runs(number: int, recorded) -> None:
    """On the second of two machines; Slurm's directives are comments to bash, and known ones."""
    script = BATCHES[number]
    known = "job-name nodes ntasks-per-node gpus-per-node gpus cpus-per-task time signal requeue open-mode output array"
    directives = re.findall(r"^#SBATCH --([a-z-]+)", script, flags=re.MULTILINE)
    assert directives
    assert set(directives) <= set(known.split())
    slurm = {"NNODES": "2", "NODEID": "1", "JOB_NODELIST": "node[0-1]", "ARRAY_TASK_ID": "2", "JOB_ID": "7"}
    [words] = recorded(script, **{f"SLURM_{name}": value for name, value in slurm.items()})
    made = settings(words)
    if words[0] == "train":
        assert (made.launch.num_nodes, made.launch.node_rank, made.launch.master_addr) == (2, 1, "node0")
    else:
        assert made.benchmark.name == "gsm8k"
        assert made.output_dir == "runs/int4/gsm8k"


def test_a_stopped_job_is_queued_again(recorded, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    (programs / "glmtune").write_text("#!/bin/sh\nexit 143\n")
    (programs / "scontrol").write_text('#!/bin/sh\n[ $1 = show ] && echo node0 || echo "$@" >> queued\n')
    with pytest.raises(AssertionError):
        recorded(BATCHES[0], SLURM_JOB_ID="7")
    assert (tmp_path / "queued").read_text() == "requeue 7\n"


# ---- Kubernetes and Docker


def pods() -> list[tuple[str, dict[str, Any]]]:
    """Return every pod of the manifests with the name of what makes it."""
    return [
        (each["metadata"]["name"], each["spec"]["template"]["spec"])
        for each in MANIFESTS
        if "template" in each["spec"]
    ]


@pytest.mark.parametrize(("name", "pod"), pods(), ids=[name for name, _ in pods()])
def test_a_pod_runs(name: str, pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    made = settings([word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"]])
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert pod["securityContext"]["runAsUser"] == 10001, "the user of the image"
    written = getattr(made, "output_dir", None)
    assert written is None or written.startswith("/srv/glmtune/"), "results outlive the pod"
    if name == "glmtune-full":
        [job] = [each for each in MANIFESTS if each["kind"] == "Job" and each["metadata"]["name"] == name]
        assert job["spec"]["completions"] == job["spec"]["parallelism"] == made.launch.num_nodes
        assert made.launch.master_addr == f"{name}-0.{pod['subdomain']}"
        services = [each for each in MANIFESTS if each["metadata"]["name"] == pod["subdomain"]]
        assert services[0]["spec"]["clusterIP"] == "None"
        assert services[0]["spec"]["selector"] == {"job-name": name}
    if container["args"][0] == "serve":
        assert made.host == "0.0.0.0"
        assert container["ports"] == [{"containerPort": made.port}]
        assert container["readinessProbe"]["httpGet"]["path"] == "/health"
        assert pod["terminationGracePeriodSeconds"] > made.limits.drain_seconds
    else:
        assert pod["restartPolicy"] == "Never", "so that exit codes are seen"


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_runs(name: str) -> None:
    service = COMPOSE["services"][name]
    words = [*service.get("entrypoint", ["glmtune"])[1:], *service["command"]]
    made = settings(words)
    dockerfile = (REPO / "Dockerfile").read_text(encoding="utf-8")
    assert set(service["build"].get("args", {})) <= set(
        re.findall(r"^ARG (\w+)", dockerfile, flags=re.MULTILINE)
    )
    assert name.removesuffix("-gpu") == words[0]
    assert ("profiles" in service) == (name != "serve"), "`docker compose up` serves, and nothing else"
    if name.endswith("-gpu"):
        assert service["image"] == "glmtune:gpu"
        assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    mounted = [volume.rpartition(":")[2] for volume in service["volumes"]]
    assert mounted == ["/models", "/home/glmtune/runs"]
    assert "chown glmtune /models /home/glmtune/runs" in dockerfile, (
        "volumes of Docker's take over whose a folder is"
    )
    if words[0] == "serve":
        assert service["ports"] == [f"127.0.0.1:${{PORT:-8000}}:{made.port}"]
        assert int(service["stop_grace_period"].removesuffix("s")) > made.limits.drain_seconds
    else:
        assert service["healthcheck"] == {"disable": True}, "the image's asks a server"
        assert made.output_dir.startswith("runs/")


def test_docker_reads_it() -> None:
    if shutil.which("docker") is None:
        pytest.skip("no docker here")
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker has no compose here")
    command = ["docker", "compose", "--profile", "gpu", "--profile", "jobs", "config", "--quiet"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_pages_lines_for_compose_are_right() -> None:
    lines = [
        shlex.split(line)
        for line in re.findall(r"^docker compose .*(?:up|run).*$", INSTALL, flags=re.MULTILINE)
    ]
    assert len(lines) > 4
    for words in lines:
        place = words.index("up") if "up" in words else words.index("run")
        name, *rest = [word for word in words[place + 1 :] if word != "--rm"]
        assert name in COMPOSE["services"]
        if rest:
            settings([*COMPOSE["services"][name]["entrypoint"][1:], *rest])
