"""Every command that writes is spoilt where it writes: it says so, nothing that was whole is lost, and it goes on.

By default one kill and one error per command, at places that change with nothing; with `-m slow` many more. All of
them, and kills by the hundred, are `tests/faults/campaign.py`.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from tests.faults.cases import ALONE, Workshop
from tests.faults.injection import Fault, WarmCommands
from tests.faults.trial import spoil_and_finish

ENOUGH = ("train-prefix", "predict", "quantize", "eval")
"""The commands run by default; the others write by the same functions."""
SPACE = ("open", "write", "mkdir")
PERMISSION = ("open", "mkdir", "rename")
ERRORS = {
    "no space": Fault(errno.ENOSPC, ops=SPACE, lasting=True),
    "no permission": Fault(errno.EACCES, ops=PERMISSION),
    "input/output": Fault(errno.EIO, ops=("write", "sync")),
}


def spread(operations: Sequence[str], ops: Sequence[str], number: int) -> list[int]:
    """Return numbers of operations of some kinds, from the first to the last, evenly."""
    count = sum(not ops or line.split()[1] in ops for line in operations)
    return sorted({1 + (count - 1) * turn // max(1, number - 1) for turn in range(number)}) if count else []


def check(
    name: str, fault: Fault, at: Sequence[int], workshop: Workshop, commands: WarmCommands
) -> list[str]:
    problems: list[str] = []
    for number in at:
        spoilt = Fault(fault.action, number, fault.ops, lasting=fault.lasting)
        folder = workshop.folder(name, f"{name}-{fault.action}-{number}", commands)
        trial = spoil_and_finish(name, folder, workshop, commands, [spoilt])
        problems += [f"{fault.action} at operation {number}: {problem}" for problem in trial.problems]
    return problems


@pytest.mark.parametrize("name", ENOUGH)
def test_killed_in_the_middle(name: str, workshop: Workshop, commands: WarmCommands) -> None:
    operations = workshop.undisturbed(name, commands).ended.operations
    assert len(operations) > 10, "nothing is counted"
    places = [2 * len(operations) // 3]
    assert check(name, Fault("kill"), places, workshop, commands) == []


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("train-prefix", "no space"),
        ("quantize", "no space"),
        ("export-over", "input/output"),
        ("eval", "no permission"),
    ],
)
def test_an_error_is_said_and_survived(
    name: str, error: str, workshop: Workshop, commands: WarmCommands
) -> None:
    fault = ERRORS[error]
    operations = workshop.undisturbed(name, commands).ended.operations
    places = spread(operations, fault.ops, 4)[2:3]
    assert places
    assert check(name, fault, places, workshop, commands) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_killed_at_many_operations(name: str, workshop: Workshop, commands: WarmCommands) -> None:
    operations = workshop.undisturbed(name, commands).ended.operations
    assert check(name, Fault("kill"), spread(operations, (), 12), workshop, commands) == []


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", ALONE)
def test_errors_at_many_operations(name: str, error: str, workshop: Workshop, commands: WarmCommands) -> None:
    fault = ERRORS[error]
    operations = workshop.undisturbed(name, commands).ended.operations
    assert check(name, fault, spread(operations, fault.ops, 5), workshop, commands) == []
