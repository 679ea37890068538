"""Several processes, one run: who answers what, agreed through files of its folder.

::

    rank 0                          files                     rank 1, 2, ...
    removes old hellos
    opens the run                   .hello-1  {nonce}    <--  says hello, again if the file vanished
    awaits a hello of each rank <-- .hello-2  {nonce}    <--
    divides what is unanswered  --> .plan.json           -->  takes its share of the plan with its nonce
    answers its share           --> journal-rankN.jsonl  <--  answers its share, and ends
    reads all journals until
    every question is answered  <--
    reports

Files, since the processes may share nothing else: a backend may be a server, without torch.distributed,
and its processes on several machines. The nonce tells this launch from a killed one, whose plan and hellos
still lie there: a plan counts for a process only if it answers the hello of just this process. Hellos of
another launch that lives do not count: its rank 0 is refused (see `glmtune.storage.lock`). Shares are
made anew by every launch from what is unanswered, so another number of processes may go on.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.answer import Key
from glmtune.errors import ConfigError, GlmtuneError
from glmtune.storage.files import write_text_atomically

PLAN_NAME = ".plan.json"
POLL_SECONDS = 0.1
"""Between two looks at a file: nothing beside the seconds a model takes to load."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those that share a run.

    Attributes:
        rank: its number, from 0; rank 0 keeps the run and reports.
        world_size: how many there are.
        wait_seconds: without any sign of the others for so long, waiting is given up.
    """

    rank: int = 0
    world_size: int = 1
    wait_seconds: float = 1800.0

    @classmethod
    def from_environment(cls, wait_seconds: float) -> Processes:
        """Read ``RANK`` and ``WORLD_SIZE`` as torchrun sets them; one process without them.

        Args:
            wait_seconds: see the class.

        Raises:
            ConfigError: they are no numbers, or do not fit each other.
        """
        given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        try:
            rank, world_size = int(given[0]), int(given[1])
        except ValueError:
            rank = world_size = -1
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"The environment has RANK={given[0]} and WORLD_SIZE={given[1]}, but RANK must be a number"
                " from 0 to WORLD_SIZE - 1. Start with `torchrun --nproc-per-node=N`, or unset both."
            )
        return cls(rank, world_size, wait_seconds)

    def share(self, folder: Path, unanswered: Callable[[], Sequence[Key]]) -> list[Key]:
        """Return what this process shall answer: a part of what is unanswered when the run begins.

        Args:
            folder: the run's output folder.
            unanswered: called in rank 0 alone, which opens the run; the keys in the order of the data.

        Returns:
            Every ``world_size``-th key, so that all have questions of every subject and are done together.

        Raises:
            GlmtuneError: the other processes do not appear in time, or what ``unanswered`` raises.
        """
        if self.world_size == 1:
            return list(unanswered())
        if self.rank:
            return self._follow(folder)
        for rank in range(1, self.world_size):  # of a killed launch; those that live say hello again
            (folder / f".hello-{rank}").unlink(missing_ok=True)
        keys = unanswered()  # before the hellos: what is refused is refused at once
        shares = [list(keys[rank :: self.world_size]) for rank in range(self.world_size)]
        hellos = self._await_hellos(folder)
        write_text_atomically(folder / PLAN_NAME, json.dumps({"hellos": hellos, "shares": shares}))
        return shares[0]

    def wait_for_answers(self, wanted: Sequence[Key], answered: Callable[[], Container[Key]]) -> None:
        """Wait in rank 0 until the others have answered the rest; other processes return at once.

        Args:
            wanted: the keys of all questions.
            answered: returns the keys that the journals answer by now.

        Raises:
            GlmtuneError: no answer came for ``wait_seconds``.
        """
        if self.rank or self.world_size == 1:
            return
        last_sign, num_left = time.monotonic(), len(wanted) + 1
        while True:
            known = answered()
            left = [key for key in wanted if key not in known]
            if not left:
                return
            if len(left) < num_left:
                last_sign, num_left = time.monotonic(), len(left)
            self._refuse_waiting(
                last_sign, f"{num_left} of {len(wanted)} questions are unanswered (first: {left[0]})"
            )
            time.sleep(10 * POLL_SECONDS)  # each look reads all journals whole

    def _await_hellos(self, folder: Path) -> dict[str, str]:
        """Return what each other process said, by rank, once all have."""
        began = time.monotonic()
        while True:
            hellos = {
                str(rank): found["nonce"]
                for rank in range(1, self.world_size)
                if (found := _read_json(folder / f".hello-{rank}")) and found.get("launch") == _launch()
            }
            if len(hellos) == self.world_size - 1:
                return hellos
            absent = next(rank for rank in range(1, self.world_size) if str(rank) not in hellos)
            self._refuse_waiting(began, f"process {absent} of {self.world_size} did not appear")
            time.sleep(POLL_SECONDS)

    def _follow(self, folder: Path) -> list[Key]:
        """Say hello until rank 0's plan knows it, and return this process's share of the plan."""
        nonce, hello = uuid.uuid4().hex, folder / f".hello-{self.rank}"
        began = time.monotonic()
        while True:
            plan = _read_json(folder / PLAN_NAME)
            if plan.get("hellos", {}).get(str(self.rank)) == nonce:
                hello.unlink(missing_ok=True)
                return [(subject, index) for subject, index in plan["shares"][self.rank]]
            # Rank 0 makes the folder, and removes a hello that came before it began: then it is said again.
            if folder.is_dir() and _read_json(hello).get("nonce") != nonce:
                write_text_atomically(hello, json.dumps({"nonce": nonce, "launch": _launch()}))
            self._refuse_waiting(began, "process 0, which opens the run, did not appear")
            time.sleep(POLL_SECONDS)

    def _refuse_waiting(self, since: float, what: str) -> None:
        if time.monotonic() - since > self.wait_seconds:
            raise GlmtuneError(
                f"process {self.rank} waited {self.wait_seconds:g} seconds (`wait_seconds`) for the others:"
                f" {what}. What is answered is kept: see why a process ended, and run the same command again,"
                " with any number of processes."
            )


def _launch() -> str:
    """Return what the processes of one launch have in common, and of two at one time not.

    Rank 0 of a second launch is refused, but the others may have said hello by then.
    """
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    return "/".join(os.environ.get(name, "") for name in names)


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object of a small file that is written atomically; empty where it is not there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
