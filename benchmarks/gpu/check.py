"""The whole check: runs the parts one after the other, prints what they find, and writes the report.

    bash scripts/gpu_check.sh                 on a machine with a CUDA card, in under eight minutes
    bash scripts/gpu_check.sh --dry-run       the same at tiny sizes on the CPU
    bash scripts/gpu_check.sh --only int4 engine-int4

Every part is a process of its own with its own time. One that fails or takes too long is reported, and the
rest goes on; the exit code is 1 then. The report is written after every part, and when the check is stopped.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.report import Outcome, file_name, write_report

REPO = Path(__file__).resolve().parents[2]
MACHINE = Part("machine", "machine", "benchmarks.gpu.machine", (), 90)
PRELOADED = ["benchmarks.gpu.preloaded"]
"""What a dry run imports once for all parts. CUDA and forks do not go together, so on a GPU each imports."""
SECONDS = 470
"""Of everything; a part gets what is left of them at most."""
DRY_FACTOR = 6
"""What all times are multiplied by in a dry run, which is no matter of time: CI's processors are shared."""
LEAST_SECONDS = 15
"""With fewer left no part begins."""
TAIL_LINES = 15


@dataclass
class Check:
    """What a check is run with, and what came of it.

    Attributes:
        device: ``cuda``, or ``cpu`` in a dry run.
        is_dry: tiny sizes.
        deadline: when all is over, in seconds of `time.monotonic`.
        out: folder of the report.
        machine: facts and versions.
        outcomes: by part.
    """

    device: str
    is_dry: bool
    deadline: float
    out: Path
    machine: dict[str, Any] = field(default_factory=dict[str, Any])
    outcomes: dict[str, Outcome] = field(default_factory=dict[str, Outcome])

    @property
    def report(self) -> Path:
        """Where the report goes."""
        return self.out / file_name(self.machine.get("card", "unknown"))

    def write(self, state: str) -> None:
        """Write the report as it is now."""
        write_report(self.report, self.machine, self.outcomes, state=state, is_dry=self.is_dry)

    def seconds_for(self, part: Part) -> float:
        """Return the time that a part may take."""
        left = self.deadline - time.monotonic()
        return min(part.seconds * (DRY_FACTOR if self.is_dry else 1), left)


def child(program: str, words: list[str], log: str) -> None:
    """Be the process of a part: its output goes to a file, its children die with it."""
    os.setsid()
    place = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(place, 1)
    os.dup2(place, 2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = [program, *words]
    code = importlib.import_module(program).main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not `sys.exit`: what a part leaves running (a pool, a compiler's workers) must not hold it up.
    os._exit(code)


@functools.cache
def starter(device: str) -> Any:
    """Return what makes processes."""
    context = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
    if device != "cuda":
        context.set_forkserver_preload(PRELOADED)
    return context


def run_part(check: Check, part: Part, folder: Path) -> Outcome:
    """Run a part to its end, or to the end of its time."""
    if reason := part.why_not():
        return Outcome(part, "skipped", note=reason)
    seconds = check.seconds_for(part)
    if seconds < LEAST_SECONDS:
        return Outcome(part, "not run", note="the time of the whole check was over")
    log, out = folder / f"{part.name}.log", folder / f"{part.name}.json"
    log.touch()
    words = list(part.words if part.dry_words is None or not check.is_dry else part.dry_words)
    words += ["--device", check.device, "--out", str(out), *(["--dry-run"] if check.is_dry else [])]
    start = time.monotonic()
    process = starter(check.device).Process(target=child, args=(part.program, words, str(log)))
    process.start()
    shown = 0
    try:
        while process.is_alive() and time.monotonic() - start < seconds:
            process.join(0.1)
            shown = show(log, shown)
        in_time = not process.is_alive()
    finally:
        end(process)
        show(log, shown)
    took = time.monotonic() - start
    figures = read_figures(out)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
    if not in_time:
        note = f"stopped after its {seconds:.0f} seconds"
        return Outcome(part, "too slow", took, figures, f"{note}\n{tail}")
    if process.exitcode != 0:
        return Outcome(part, "failed", took, figures, f"exit code {process.exitcode}\n{tail}")
    skipped = figures.get("skipped") if part.kind != "tests" else None
    return Outcome(part, "skipped" if skipped else "done", took, figures, str(skipped or ""))


def read_figures(file: Path) -> dict[str, Any]:
    """Read what a part has written so far."""
    return json.loads(file.read_text()) if file.is_file() else {}


def end(process: Any) -> None:
    """Kill what is left of a part: its whole session, which it leads."""
    if process.pid is None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # over, or not yet a leader
        process.kill()
    process.join(10)


def show(log: Path, shown: int) -> int:
    """Print what a part has said since, indented; return how many bytes have been shown in all."""
    with log.open("rb") as file:
        file.seek(shown)
        new = file.read()
    whole = new[: new.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        say(f"    {line}")
    return shown + len(whole)


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def stop(number: int, frame: Any) -> None:
    """Turn a signal into an exception, so that parts are ended and the report is written."""
    raise SystemExit(128 + number)


def run_all(check: Check, parts: list[Part], folder: Path) -> None:
    """Run the parts and keep the report up to date."""
    check.outcomes |= {part.name: Outcome(part, "not run") for part in parts}
    check.write("running")
    for part in parts:
        say(f"{part.name}:")
        try:
            found = check.outcomes[part.name] = run_part(check, part, folder)
        except SystemExit:
            figures = read_figures(folder / f"{part.name}.json")
            check.outcomes[part.name] = Outcome(part, "stopped", figures=figures)
            raise
        note = found.note.splitlines()[0] if found.note else ""
        say(f"  {found.state}{f' ({note})' if note else ''}, {found.seconds:.1f} s")
        check.write("running")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[part.name for part in PARTS])
    parser.add_argument("--out", type=Path, help="folder of the report; default: benchmarks/results/gpu")
    parser.add_argument("--seconds", type=float, help=f"of everything; default: {SECONDS}")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    return parser.parse_args()


def main() -> int:
    """Run the check; 0: every part that can run here is done, 1: one failed, was too slow or had no time."""
    options = parse_arguments()
    if options.list:
        for part in PARTS:
            say(f"{part.name:<20}{part.seconds:>4} s  {part.program} {' '.join(part.words)}")
        return 0
    out = options.out or (
        Path(tempfile.mkdtemp(prefix="gpu_check_")) if options.dry_run else REPO / "benchmarks/results/gpu"
    )
    out.mkdir(parents=True, exist_ok=True)
    if options.dry_run:
        os.environ |= {"GLMTUNE_GPU_DRY_RUN": "1", "OMP_NUM_THREADS": "1"}
    device = "cpu" if options.dry_run else "cuda"
    seconds = options.seconds or SECONDS * (DRY_FACTOR if options.dry_run else 1)
    check = Check(device, options.dry_run, time.monotonic() + seconds, out)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    parts = [part for part in PARTS if options.only is None or part.name in options.only]
    with tempfile.TemporaryDirectory() as folder:
        facts = run_part(check, MACHINE, Path(folder))
        if facts.state != "done":
            say(f"machine: {facts.state}. {facts.note}")
            return 2
        check.machine = facts.figures
        state = "stopped before its end"
        try:
            run_all(check, parts, Path(folder))
            state = "complete"
        finally:
            check.write(state)
            say(f"report: {check.report}")
    bad = [name for name, found in check.outcomes.items() if found.state not in ("done", "skipped")]
    if bad:
        say(f"not well: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
