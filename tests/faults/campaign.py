"""Campaigns against the promises of `docs/reliability.md`: run them from the top of a checkout.

    python -m tests.faults.campaign kills --kills 100   SIGKILL at random times, over all commands and processes
    python -m tests.faults.campaign writes              SIGKILL at every single operation on files of every command
    python -m tests.faults.campaign flips --flips 200   one byte flipped, wherever it falls

Each appends its trials to ``OUT/CAMPAIGN.jsonl`` as they end, so it goes on where it was stopped (also with a higher
number), and writes a table to ``OUT/CAMPAIGN.md``. The same seed gives the same trials, though not the same moments.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import processes
from tests.faults.cases import ALONE, CASES, Workshop
from tests.faults.flips import FLIPS, OUTCOMES, Prepared, flip_one, prepare
from tests.faults.injection import Fault, WarmCommands, missing
from tests.faults.trial import spoil_and_finish

CHAIN = (1, 2, 2, 3, 4)
"""How many kills come before a run may end."""
SOME_PROCESSES = tuple(name for name in CASES if name not in ALONE)
Record = dict[str, Any]
Job = tuple[str, Callable[[WarmCommands], Record]]


@dataclass
class Journal:
    """Trials by key, kept in a file as they end.

    Attributes:
        path: of the file.
        records: what was there and what came.
    """

    path: Path
    records: dict[str, Record] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.path.exists():
            *lines, _ = self.path.read_text(encoding="utf-8").split("\n")  # the last may be torn by a kill
            self.records = {record["key"]: record for record in map(json.loads, lines)}
            self.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def put(self, key: str, record: Record) -> None:
        with self._lock:
            self.records[key] = record = {"key": key, **record}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def total(self, name: str) -> int:
        return sum(record.get(name, 0) for record in list(self.records.values()))


def run_jobs(
    jobs: Iterator[Job], journal: Journal, crew: list[WarmCommands], *, enough: Callable[[], bool]
) -> None:
    """Let each of the crew take the next job until there is none, or enough has been done."""
    taking, start, done = threading.Lock(), time.monotonic(), itertools.count(1)

    def work(commands: WarmCommands) -> None:
        while True:
            with taking:
                if enough() or (job := next(jobs, None)) is None:
                    return
            key, trial = job
            if key in journal.records:
                continue
            began = time.monotonic()
            record = {**trial(commands), "seconds": round(time.monotonic() - began, 1)}
            journal.put(key, record)
            clock = time.monotonic() - start
            print(f"[{clock:6.0f} s, {next(done)}] {key}: {record['summary']}", flush=True)

    threads = [threading.Thread(target=work, args=(each,)) for each in crew]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def kill_jobs(names: list[str], seed: int, workshop: Workshop, several: dict[str, Any]) -> Iterator[Job]:
    """Yield chains of kills, one command after the other, without end."""
    for number in itertools.count():
        for name in names:
            chance = random.Random(f"{seed} {name} {number}")
            trial = _several_trial if name in several else _alone_trial
            yield f"{name}/{seed}/{number}", _bound(trial, name, number, chance, workshop, several)


def _bound(trial: Callable[..., Record], *given: Any) -> Callable[[WarmCommands], Record]:
    return lambda commands: trial(*given, commands)


def _alone_trial(
    name: str, number: int, chance: random.Random, workshop: Workshop, _: Any, commands: WarmCommands
) -> Record:
    known = workshop.undisturbed(name, commands)
    moments = [chance.uniform(0.05, 1.0) * known.ended.seconds for _ in range(chance.choice(CHAIN))]
    return _spoilt(name, f"{name}-{number}", moments, workshop, commands)


def _spoilt(name: str, label: str, faults: list[Any], workshop: Workshop, commands: WarmCommands) -> Record:
    folder = workshop.folder(name, label, commands)
    trial = spoil_and_finish(name, folder, workshop, commands, faults)
    shutil.rmtree(folder, ignore_errors=True)
    return _record(name, asdict(trial))


def _several_trial(
    name: str, number: int, chance: random.Random, workshop: Workshop, several: Any, commands: WarmCommands
) -> Record:
    victims = [processes.VICTIMS[(number + turn) % 3] for turn in range(chance.choice(CHAIN))]
    folder = workshop.root / "work" / f"{name}-{number}"
    trial = processes.kill_and_finish(name, folder, workshop, several[name], victims, chance)
    shutil.rmtree(folder, ignore_errors=True)
    return _record(f"{name}", {**asdict(trial), "victims": victims[: trial.kills]})


def _record(name: str, trial: dict[str, Any]) -> Record:
    problems = trial["problems"]
    kept = trial if problems else {key: value for key, value in trial.items() if key != "outputs"}
    said = f"PROBLEM {problems[0][:150]}" if problems else "identical"
    return {"command": name, **kept, "summary": f"{trial['kills']} kills, {said}"}


def write_jobs(names: list[str], every: int, workshop: Workshop) -> Iterator[Job]:
    """Yield one kill for each operation of each command, or every n-th of them."""
    for name in names:
        count = len(workshop.undisturbed(name, None).ended.operations)  # type: ignore[arg-type]  # it is known
        for at in range(1, count + 1, every):
            faults = [Fault("kill", at)]
            yield f"{name}/{at}", _bound(_spoilt, name, f"{name}-{at}", faults, workshop)


def flip_jobs(names: list[str], seed: int, workshop: Workshop, ready: dict[str, Prepared]) -> Iterator[Job]:
    """Yield flips, one folder after the other, without end."""
    for number in itertools.count():
        for name in names:
            yield f"{name}/{seed}/{number}", _bound(_flip_trial, name, number, seed, workshop, ready)


def _flip_trial(
    name: str, number: int, seed: int, workshop: Workshop, ready: dict[str, Prepared], commands: WarmCommands
) -> Record:
    chance = random.Random(f"{seed} {name} {number}")
    label = f"flip-{list(FLIPS).index(name)}-{number}"
    flipped = flip_one(name, label, ready[name], workshop, commands, chance)
    summary = f"{flipped.place}: {flipped.outcome}"
    return {"command": name, **asdict(flipped), "flips": 1, "summary": summary}


def kill_table(records: list[Record]) -> str:
    """Lay out what kills came to, one line per command."""
    lines = ["| command | chains | kills | identical | notes |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(record["command"] for record in records):
        own = [record for record in records if record["command"] == name]
        good = sum(not record["problems"] for record in own)
        victims = Counter(victim for record in own for victim in record.get("victims", ()))
        notes = [f"{count} x {victim}" for victim, count in sorted(victims.items())]
        broken = Counter(_kind(problem) for record in own for problem in record["problems"][:1])
        notes += [f"{count} chains: {kind}" for kind, count in broken.most_common(4)]
        kills = sum(record["kills"] for record in own)
        lines.append(f"| {name} | {len(own)} | {kills} | {good} | {'; '.join(notes)} |")
    total = sum(record["kills"] for record in records)
    good = sum(not record["problems"] for record in records)
    return "\n".join([*lines, f"| all | {len(records)} | {total} | {good} | |", ""])


def flip_table(records: list[Record]) -> str:
    """Lay out what flipped bytes came to, one line per folder and reader."""
    lines = [f"| folder, reader | flips | {' | '.join(OUTCOMES)} |", "|---" * (len(OUTCOMES) + 2) + "|"]
    names = dict.fromkeys(record["command"] for record in records)
    for name in [*names, "all"]:
        own = [record for record in records if name in (record["command"], "all")]
        counts = Counter(record["outcome"] for record in own)
        lines.append(f"| {name} | {len(own)} | {' | '.join(str(counts[kind]) for kind in OUTCOMES)} |")
    bad = [record for record in records if record["outcome"] in ("SILENT", "raw error")]
    listed = [f"- {record['outcome']}: {record['command']}, {record['place']}" for record in bad]
    return "\n".join([*lines, "", *listed, ""])


def _kind(problem: str) -> str:
    return problem.partition(": ")[0].replace("|", "/")[:60]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("campaign", choices=("kills", "writes", "flips"))
    parser.add_argument("--kills", type=int, default=100, help="how many SIGKILLs (kills)")
    parser.add_argument("--flips", type=int, default=200, help="how many bytes (flips)")
    parser.add_argument("--every", type=int, default=1, help="only every n-th operation (writes)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--commands", help="comma-separated; default: all of the campaign")
    parser.add_argument("--workers", type=int, default=2, help="how many trials at once")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/campaigns"), help="folder of journals and tables"
    )
    return parser.parse_args()


def main() -> int:
    """Run a campaign; 1 if a promise was broken."""
    if reason := missing():
        print(reason)
        return 2
    given = arguments()
    choices = {"kills": list(CASES), "writes": list(ALONE), "flips": list(FLIPS)}[given.campaign]
    names = given.commands.split(",") if given.commands else choices
    if given.campaign == "flips" and given.commands:
        names = [name for name in choices if name.replace(", ", "-").replace(" ", "-") in names]
    if unknown := set(names) - set(choices) or (not names and {given.commands}):
        print(f"unknown: {', '.join(map(str, unknown))}; there are {', '.join(choices)}")
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(given.out / f"{given.campaign}.jsonl")
    root = Path(tempfile.mkdtemp(prefix="glmtune-campaign-")).resolve()
    try:
        with ExitStack() as stack:
            crew = [WarmCommands(_folder(root / f"warm{turn}")) for turn in range(given.workers)]
            for each in crew:
                stack.enter_context(each)
            _run(given, names, journal, Workshop(root), crew)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    records = list(journal.records.values())
    table = (flip_table if given.campaign == "flips" else kill_table)(records)
    (given.out / f"{given.campaign}.md").write_text(table, encoding="utf-8")
    print(f"\n{table}")
    return int(any(r.get("problems") or r.get("outcome") in ("SILENT", "raw error") for r in records))


def _run(
    given: argparse.Namespace,
    names: list[str],
    journal: Journal,
    workshop: Workshop,
    crew: list[WarmCommands],
) -> None:
    print("running everything undisturbed", flush=True)
    if given.campaign == "flips":
        ready = {name: prepare(name, workshop, crew[0]) for name in names}
        jobs = flip_jobs(names, given.seed, workshop, ready)
        run_jobs(jobs, journal, crew, enough=lambda: journal.total("flips") >= given.flips)
        return
    several = {name: processes.undisturbed(name, workshop) for name in names if name in SOME_PROCESSES}
    for name in names:
        if name not in several:
            workshop.undisturbed(name, crew[0])
    if given.campaign == "writes":
        run_jobs(write_jobs(names, given.every, workshop), journal, crew, enough=lambda: False)
    else:
        jobs = kill_jobs(names, given.seed, workshop, several)
        run_jobs(jobs, journal, crew, enough=lambda: journal.total("kills") >= given.kills)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


if __name__ == "__main__":
    sys.exit(main())
