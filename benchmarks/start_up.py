"""Seconds from a command to its first line and to the end of a minimal job, of one or two checkouts in turn.

    python benchmarks/start_up.py --out new.json
    python benchmarks/start_up.py --checkouts OLD NEW --rounds 5 --out both.json

Every command is a process of its own, with glm-tiny and data that ships. Two figures each: seconds on the
clock, and seconds of the processor (all threads and child processes), which other jobs change little.
`serve` ends once `/health` says that it is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parents[1]
PORT = 8765
SMALL_EVAL = "eval benchmark=mmlu benchmark.limit=2 benchmark.max_new_tokens=2"


@dataclass(frozen=True)
class Job:
    """A minimal job.

    Attributes:
        words: after `glmtune`; OUT is a fresh folder, RUNS what was prepared.
        typed: given to its input.
        serves: it runs until it is told to stop.
        codes: exit codes that it may end with.
    """

    words: str
    typed: str = ""
    serves: bool = False
    codes: tuple[int, ...] = (0,)


JOBS = {
    "--help": Job("--help"),
    "train --help": Job("train --help"),
    "train": Job(
        "train +recipe=ptuning trainer.max_steps=1 data.max_train_samples=64 data.max_eval_samples=8 "
        "prefix.switch=false retention=null resume=never output_dir=OUT"
    ),
    "predict": Job(
        "predict data=ads split=validation data.max_predict_samples=2 generation.max_new_tokens=2 "
        "output_dir=OUT"
    ),
    "eval": Job(f"{SMALL_EVAL} output_dir=OUT"),
    "compare": Job("compare runs=[RUNS/a,RUNS/b] output_dir=OUT", codes=(0, 3, 4)),
    "chat": Job("chat history_file=null max_new_tokens=2", typed="1+1\n"),
    "serve": Job(f"serve port={PORT}", serves=True, codes=(0, 143)),
    "quantize": Job("quantize model=glm-tiny quantization.method=int4 output_dir=OUT"),
    "export": Job("export model=glm-tiny format=transformers output_dir=OUT"),
    "plan": Job("plan +recipe=ptuning model=chatglm2-6b hardware=1x24GB"),
    "data check": Job("data check data=ads"),
}


@dataclass
class Measured:
    """Seconds by job, one of each round."""

    first: list[float] = field(default_factory=list[float])
    first_cpu: list[float] = field(default_factory=list[float])
    end: list[float] = field(default_factory=list[float])
    end_cpu: list[float] = field(default_factory=list[float])


def environment(checkout: Path) -> dict[str, str]:
    """Return the environment of a command."""
    names = {"PYTHONPATH": str(checkout), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **names, "HF_HUB_OFFLINE": "1"}


def cpu_seconds(process: psutil.Process) -> float:
    """Return the processor time of a process and its children so far."""
    times = process.cpu_times()
    return times.user + times.system + times.children_user + times.children_system


def wait_until_loaded() -> None:
    """Ask a server for its health until it is well."""
    for _ in range(1200):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.05)
    raise SystemExit("the server was not loaded within a minute")


def measure(job: Job, checkout: Path, runs: Path, found: Measured) -> None:
    """Run a job once and add its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        words = job.words.replace("OUT", f"{folder}/out").replace("RUNS", str(runs)).split()
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "glmtune", *words],
            cwd=folder,
            env=environment(checkout),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(job.typed.encode())
        process.stdin.close()
        said = wait_for_line(process)
        found.first.append(time.perf_counter() - start)
        try:
            found.first_cpu.append(cpu_seconds(psutil.Process(process.pid)))
        except psutil.NoSuchProcess:
            found.first_cpu.append(found.first[-1])
        if job.serves:
            wait_until_loaded()
            process.send_signal(signal.SIGTERM)
        said += drain(process)
        _, status, usage = os.wait4(process.pid, 0)
        found.end.append(time.perf_counter() - start)
        found.end_cpu.append(usage.ru_utime + usage.ru_stime)
        code = os.waitstatus_to_exitcode(status)
        if code not in job.codes:
            raise SystemExit(
                f"`glmtune {' '.join(words)}` ended with {code}: {said.decode(errors='replace')[-2000:]}"
            )


def wait_for_line(process: subprocess.Popen[bytes]) -> bytes:
    """Read both outputs until one has a line that says something."""
    return _read(process, until_line=True)


def drain(process: subprocess.Popen[bytes]) -> bytes:
    """Read both outputs to their end."""
    return _read(process, until_line=False)


def _read(process: subprocess.Popen[bytes], *, until_line: bool) -> bytes:
    assert process.stdout is not None
    assert process.stderr is not None
    said = {process.stdout: b"", process.stderr: b""}
    with selectors.DefaultSelector() as selector:
        for stream in said:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                stream: Any = key.fileobj
                piece = os.read(stream.fileno(), 65536)
                said[stream] += piece
                if not piece:
                    selector.unregister(stream)
                if until_line and any(b"\n" in each.lstrip() for each in said.values()):
                    return b"".join(said.values())
    return b"".join(said.values())


def prepare(runs: Path) -> None:
    """Make the two evaluations that `compare` compares."""
    for name in ("a", "b"):
        words = [*SMALL_EVAL.split(), f"output_dir={runs / name}"]
        subprocess.run(
            [sys.executable, "-m", "glmtune", *words], env=environment(HERE), check=True, capture_output=True
        )


def main() -> None:
    """Measure in rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--checkouts", nargs="+", type=Path, default=[HERE], help="folders of glmtune, in turn"
    )
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file of all measurements")
    options = parser.parse_args()
    found = {(job, place): Measured() for job in options.jobs for place in options.checkouts}
    with tempfile.TemporaryDirectory() as folder:
        if "compare" in options.jobs:
            prepare(Path(folder))
        for number in range(options.rounds):
            for job in options.jobs:
                for place in options.checkouts:
                    measure(JOBS[job], place.resolve(), Path(folder), found[job, place])
            sys.stderr.write(f"round {number + 1} of {options.rounds}\n")
    if options.out is not None:
        values = [{"job": job, "checkout": str(place), **vars(each)} for (job, place), each in found.items()]
        options.out.write_text(json.dumps(values, indent=2) + "\n")
    heads = [f"{name} {what}" for what in ("first line", "end") for name in map(str, options.checkouts)]
    lines = [f"| command | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for job in options.jobs:
        cells = []
        for what in ("first", "end"):
            for place in options.checkouts:
                values = vars(found[job, place])
                clock, cpu = statistics.median(values[what]), statistics.median(values[f"{what}_cpu"])
                cells.append(f"{cpu:.2f} ({clock:.2f})")
        lines.append(f"| {job} | {' | '.join(cells)} |")
    sys.stdout.write(
        "Seconds of the processor, medians (in brackets: on the clock).\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
