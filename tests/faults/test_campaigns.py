"""The campaigns themselves: a damaged byte is judged rightly, a chain of kills counted, and both go on where stopped."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from tests.faults import flips
from tests.faults.campaign import Journal, flip_table, kill_jobs, kill_table, run_jobs
from tests.faults.cases import Workshop
from tests.faults.injection import Ended, WarmCommands

WHOLE = {"results.json": {"/score": "1"}}
OTHER = {"results.json": {"/score": "2"}}
USUAL = Ended(0, "Written: out\n", 1.0)


@pytest.mark.parametrize(
    ("ended", "result", "outcome"),
    [
        (Ended(0, "Written: out\n", 1.0), WHOLE, "harmless"),
        (Ended(0, "Written: out\n", 1.0), OTHER, "SILENT"),
        (Ended(0, "line 3 of the journal is damaged\nWritten: out\n", 1.0), WHOLE, "said, same result"),
        (Ended(0, "line 3 of the journal is damaged\nWritten: out\n", 1.0), OTHER, "said, other result"),
        (Ended(1, "glmtune: out/last is damaged\n", 1.0), {}, "refused"),
        (Ended(1, "glmtune: unexpected KeyError: 'x'\n", 1.0), {}, "raw error"),
        (Ended(1, "Traceback (most recent call last):\n", 1.0), {}, "raw error"),
        (Ended(-11, "", 1.0), {}, "raw error"),
    ],
)
def test_outcomes(ended: Ended, result: dict, outcome: str) -> None:
    assert flips.judge(WHOLE, USUAL, ended, result, (0,))[0] == outcome


def test_a_flipped_byte_changes_one_place(
    workshop: Workshop, commands: WarmCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder given and nowhere else, and each trial begins with what was undamaged."""
    prepared = flips.prepare("resume eval", workshop, commands)
    before = {path: path.read_bytes() for path in prepared.folder.rglob("*") if path.is_file()}
    seen = []
    run = commands.run

    def looking(words: list[str], cwd: Path, **named: object) -> Ended:
        content = {path: (cwd / path.relative_to(prepared.folder)).read_bytes() for path in before}
        seen.append([path for path in before if content[path] != before[path]])
        changed = seen[-1][0]
        pairs = zip(before[changed], content[changed], strict=True)
        seen[-1].append(sum(old != new for old, new in pairs))
        return run(words, cwd, **named)

    monkeypatch.setattr(commands, "run", looking)
    found = [
        flips.flip_one("resume eval", f"flip-{turn}", prepared, workshop, commands, random.Random(turn))
        for turn in range(2)
    ]
    assert [len(each) for each in seen] == [2, 2]
    assert [each[1] for each in seen] == [1, 1]
    assert {each.outcome for each in found} <= set(flips.OUTCOMES)
    assert len({each.place for each in found}) == 2


def test_a_campaign_goes_on_where_it_stopped(
    tmp_path: Path, workshop: Workshop, commands: WarmCommands
) -> None:
    journal = Journal(tmp_path / "kills.jsonl")
    jobs = kill_jobs(["data"], 1, workshop, {})
    run_jobs(jobs, journal, [commands], enough=lambda: len(journal.records) >= 1)
    with journal.path.open("a") as file:
        file.write('{"key": "data/1/1", "comm')  # torn by a kill
    again = Journal(journal.path)
    assert list(again.records) == ["data/1/0"]
    run_jobs(kill_jobs(["data"], 1, workshop, {}), again, [commands], enough=lambda: len(again.records) >= 2)
    assert list(Journal(journal.path).records) == ["data/1/0", "data/1/1"]


def test_jobs_are_shared_and_done_once(tmp_path: Path) -> None:
    def trial(commands: WarmCommands) -> dict:
        return {"summary": threading.current_thread().name}

    journal = Journal(tmp_path / "kills.jsonl")
    crew = [WarmCommands(tmp_path), WarmCommands(tmp_path)]
    run_jobs(iter([(str(n), trial) for n in range(20)]), journal, crew, enough=lambda: False)
    assert sorted(journal.records, key=int) == [str(n) for n in range(20)]


def test_tables() -> None:
    kills = [
        {"command": "eval", "kills": 2, "problems": [], "summary": ""},
        {"command": "eval", "kills": 3, "problems": ["lost: answers: 3 -> 2"], "summary": ""},
        {"command": "two", "kills": 1, "problems": [], "victims": ["launcher"], "summary": ""},
    ]
    table = kill_table(kills)
    assert "| eval | 2 | 5 | 1 | 1 chains: lost |" in table
    assert "| two | 1 | 1 | 1 | 1 x launcher |" in table
    assert "| all | 3 | 6 | 2 | |" in table
    flipped = [
        {"command": "score", "outcome": "harmless", "place": "a byte 1"},
        {"command": "score", "outcome": "SILENT", "place": "b byte 2"},
    ]
    assert "| all | 2 | 0 | 0 | 1 | 0 | 0 | 1 |" in flip_table(flipped)
    assert "- SILENT: score, b byte 2" in flip_table(flipped)
