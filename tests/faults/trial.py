"""One trial: a command is spoilt, perhaps several times, then finishes; what is to be complained of is listed."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.cases import CASES, Workshop
from tests.faults.injection import Ended, Fault, WarmCommands
from tests.faults.meaning import achieved, differences, half_written, leftovers, meaning

NO_SPACE = re.compile(os.strerror(errno.ENOSPC) + r"|disk is full", re.IGNORECASE)


@dataclass
class Trial:
    """What came of a trial.

    Attributes:
        problems: promises that were broken; none where all held.
        kills: how many sessions died of a SIGKILL.
        outputs: what each session said, the last 2000 characters.
    """

    problems: list[str] = field(default_factory=list)
    kills: int = 0
    outputs: list[str] = field(default_factory=list)

    def note(self, ended: Ended) -> None:
        """Keep what a session said."""
        self.kills += ended.is_killed
        self.outputs.append(ended.output[-2000:])


def spoil_and_finish(
    name: str,
    folder: Path,
    workshop: Workshop,
    commands: WarmCommands,
    faults: Sequence[Fault | float],
) -> Trial:
    """Run a case with one fault after the other, then once more without, and compare with the undisturbed run.

    Args:
        name: of the case, whose undisturbed run is known.
        folder: its working folder, fresh.
        workshop: where results lie.
        commands: who runs.
        faults: one session each; a number is the second at which it is killed.
    """
    trial = Trial()
    for fault in faults:
        before = achieved(folder)
        ended = _session(name, folder, workshop, commands, fault)
        trial.note(ended)
        if isinstance(fault, Fault) and fault.action != "kill":
            trial.problems += _said_wrongly(name, ended, fault)
            if ended.code in CASES[name].codes:
                expected = workshop.undisturbed(name, commands).result
                trial.problems += [
                    f"claims success: {lack}" for lack in differences(expected, meaning(folder))[:5]
                ]
        elif not ended.is_killed:
            if ended.code not in CASES[name].codes:
                trial.problems.append(f"ended with {ended.code} instead of going on: {ended.output[-300:]}")
            break
        trial.problems += [f"half written: {found}" for found in half_written(folder)]
        trial.problems += lost(before, achieved(folder))
        trial.problems += _neither_old_nor_new(name, folder, workshop, commands)
    finish(name, folder, workshop, commands, trial)
    return trial


def finish(name: str, folder: Path, workshop: Workshop, commands: WarmCommands, trial: Trial) -> None:
    """Let the same command end undisturbed, and add to a trial what is not as it should be."""
    expected = workshop.undisturbed(name, commands).result
    # Killed between the last rename and its end: the result is whole, and is not replaced without being asked.
    is_done = name in ("quantize", "export") and meaning(folder) == expected
    ended = commands.run(workshop.words(name), folder)
    trial.note(ended)
    if ended.code not in CASES[name].codes and not (is_done and ended.says_why):
        trial.problems.append(f"the same command ends with {ended.code}: {ended.output[-500:]}")
    trial.problems += differences(expected, meaning(folder))[:10]
    trial.problems += [f"left behind: {found}" for found in leftovers(folder)]


def _session(
    name: str, folder: Path, workshop: Workshop, commands: WarmCommands, fault: Fault | float
) -> Ended:
    if isinstance(fault, Fault):
        return commands.run(workshop.words(name), folder, fault=fault)
    return commands.run(workshop.words(name), folder, kill_after=fault)


def _said_wrongly(name: str, ended: Ended, fault: Fault) -> list[str]:
    """List what is wrong with how a command took an error of the system; to do without the file is fine."""
    if ended.is_raw:
        return [f"a raw error: {ended.output[-500:]}"]
    if ended.code in CASES[name].codes:
        return []
    if not ended.says_why:
        return [f"no message (code {ended.code}): {ended.output[-300:]}"]
    if fault.action == errno.ENOSPC and not NO_SPACE.search(ended.output):
        return [f"a full disk does not read as one: {ended.output[-300:]}"]
    return []


def lost(before: dict[str, int], now: dict[str, int]) -> list[str]:
    """List what had been saved and is there no more."""
    return [
        f"lost: {what}: {count} -> {now.get(what, 0)}"
        for what, count in before.items()
        if now.get(what, 0) < count
    ]


def _neither_old_nor_new(name: str, folder: Path, workshop: Workshop, commands: WarmCommands) -> list[str]:
    """Where a result replaces another one, its name must always hold one of them, whole."""
    if name not in ("quantize", "export") and not CASES[name].before:
        return []
    known, now = workshop.undisturbed(name, commands), meaning(folder)
    if now in (known.result, known.earlier):
        return []
    return [f"neither the old nor the new result: {differences(known.result, now)[:3]}"]
