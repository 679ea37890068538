"""A run of several processes, started for real: its launcher, one of its workers or all of them are killed."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.faults.cases import CASES, Undisturbed, Workshop
from tests.faults.injection import Ended, environment
from tests.faults.meaning import achieved, differences, half_written, leftovers, meaning
from tests.faults.trial import Trial, lost

VICTIMS = ("launcher", "worker", "group")
OUTLIVE_SECONDS = 3.0
"""How long workers may go on without their launcher."""
PATIENCE_SECONDS = 300.0
STARTUP_SHARE = 0.25
"""Of the kills, how many come before training begins, which is most of the time of so small a run."""


@dataclass
class Launched:
    """One start of `glmtune` as a process of its own, in a group of its own.

    Attributes:
        launcher: the process started.
        log: what it and its workers say.
        started: clock at the start.
    """

    launcher: psutil.Popen
    log: Path
    started: float = field(default_factory=time.monotonic)

    def workers(self) -> list[psutil.Process]:
        """Return the processes that train, now."""
        with suppress(psutil.NoSuchProcess):
            children = self.launcher.children(recursive=True)
            return [child for child in children if "--settings" in _words(child)]
        return []

    def all(self) -> list[psutil.Process]:
        """Return the launcher and all that it has started, now."""
        with suppress(psutil.NoSuchProcess):
            return [self.launcher, *self.launcher.children(recursive=True)]
        return []

    def ended(self) -> Ended:
        """Wait for the launcher and say how it ended."""
        code = self.launcher.wait(timeout=PATIENCE_SECONDS)
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return Ended(code, text, time.monotonic() - self.started)


def launch(words: list[str], folder: Path, scratch: Path) -> Launched:
    """Start a command; its log lies beside its folder."""
    log = folder.with_suffix(".log")
    variables = environment(scratch) | {"DS_ACCELERATOR": "cpu"}
    with log.open("wb") as output:
        process = psutil.Popen(
            [sys.executable, "-m", "glmtune", *words],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Launched(process, log)


def undisturbed(name: str, workshop: Workshop) -> tuple[Undisturbed, float, float]:
    """Run a case of several processes; return its result, the second when training began, and the last one."""
    folder = _empty(workshop.root / "inputs" / name)
    launched = launch(workshop.words(name), folder, workshop.root)
    begun = _wait_for_training(launched, folder)
    ended = launched.ended()
    if ended.code != 0:
        raise RuntimeError(f"{name} fails undisturbed ({ended.code}):\n{ended.output[-3000:]}")
    return Undisturbed(meaning(folder), {}, ended), begun, ended.seconds


def kill_and_finish(
    name: str,
    folder: Path,
    workshop: Workshop,
    expected: tuple[Undisturbed, float, float],
    victims: list[str],
    chance: random.Random,
) -> Trial:
    """Start a case again and again, each time killing one of the victims, then let it end and compare."""
    trial, survivors = Trial(), set[psutil.Process]()
    known, begun, last = expected
    _empty(folder)
    try:
        for victim in victims:
            before = achieved(folder)
            launched = launch(workshop.words(name), folder, workshop.root)
            if chance.random() < STARTUP_SHARE:
                time.sleep(chance.uniform(0.0, begun))
            else:
                _wait_for_training(launched, folder, known_steps=before)
                time.sleep(chance.uniform(0.0, last - begun))
            family = launched.all()
            if (code := launched.launcher.poll()) is not None:  # before anybody was killed
                if code != 0:
                    trial.problems.append(f"a start ends with {code}: {launched.ended().output[-500:]}")
                break
            trial.problems += _kill(victim, launched, family, chance)
            trial.kills += 1
            alive = _survivors(family)
            survivors |= alive
            if alive:
                words = "; ".join(" ".join(_words(process))[-100:] for process in alive)
                told = f"{len(alive)} processes outlive a killed {victim} by {OUTLIVE_SECONDS:.0f} s"
                trial.problems.append(f"{told}: {words}")
            trial.outputs.append(launched.log.read_text(encoding="utf-8", errors="replace")[-2000:])
            trial.problems += [f"half written: {found}" for found in half_written(folder)]
            trial.problems += lost(before, achieved(folder))
        ended = launch(workshop.words(name), folder, workshop.root).ended()
        trial.note(ended)
        if ended.code != 0:
            trial.problems.append(f"the same command ends with {ended.code}: {ended.output[-500:]}")
        trial.problems += differences(known.result, meaning(folder))[:10]
        trial.problems += [f"left behind: {found}" for found in leftovers(folder)]
    finally:
        for process in survivors:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    return trial


def _kill(victim: str, launched: Launched, family: list[psutil.Process], chance: random.Random) -> list[str]:
    if victim == "group":
        for process in family:  # one by one, as torch gives each worker a group of its own
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return []
    workers = launched.workers()
    if victim == "worker" and workers:
        chance.choice(workers).kill()
        ended = launched.ended()
        if ended.code == 0 or not ended.says_why:
            return [f"no message of a killed worker (code {ended.code}): {ended.output[-300:]}"]
        return []
    launched.launcher.kill()
    launched.launcher.wait()
    return []


def _survivors(family: list[psutil.Process]) -> set[psutil.Process]:
    _, alive = psutil.wait_procs(family, timeout=OUTLIVE_SECONDS)
    return {process for process in alive if _is_alive(process)}


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_for_training(launched: Launched, folder: Path, known_steps: dict[str, int] | None = None) -> float:
    """Return the second when the log of the run grew, or the process ended."""
    log = folder / "out" / "trainer_log.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else None
    while launched.launcher.poll() is None:
        if log.exists() and log.stat().st_mtime_ns != before:
            break
        time.sleep(0.02)
    return time.monotonic() - launched.started


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def is_of_several(name: str) -> bool:
    """Whether a case starts several processes."""
    return CASES[name].processes > 1
