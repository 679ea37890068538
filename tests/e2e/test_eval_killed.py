"""An evaluation killed with SIGKILL again and again ends with the answers and results of one never stopped.

All is compared exactly but the log-probabilities of the choices. Their last digits depend on the questions that are
read together, and these on how many answers each process had when it was killed, which no two launches repeat. Texts
and letters do not hang on that: where two tokens come closest in these questions, they are 0.0035 apart in logits
that differ by some 0.00001 between batches.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.warm.start import warm_python

# One process imports everything once and forks the processes of each session; one of them kills itself, the rest
# are killed with it, as torchrun does.
DRIVER = '''
import json, os, random, signal, sys, time

import matplotlib.figure, torch

torch.set_num_threads(1)
plan = json.loads(sys.argv[1])
import evaluation.backends.glm
from evaluation.reporting import files as report
from glmtune.storage.files import partial_of
from glmtune.storage.journal import Journal
from recipes.words.compose import load_settings
from recipes.eval import COMMAND, run


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_journalling(number, how):
    """Kill the process around the write of its answer with that number: before it, in its middle, after it."""
    append, count = Journal.append, 0

    def deadly(self, answer):
        nonlocal count
        count += 1
        if count == number and how == "before":
            die()
        if count == number and how == "middle":
            line = answer.to_line().encode()
            with self.path.open("ab", buffering=0) as file:
                file.write(line[: len(line) // 2])
            die()
        append(self, answer)
        if count == number:
            die()

    Journal.append = deadly


def die_while_reporting(at):
    """Kill the process before the report, or after a few of its files."""
    if at == 0:
        from evaluation import evaluate

        evaluate.write_report = die
        return
    write, count = report.write_text_atomically, 0

    def deadly(path, text):
        nonlocal count
        count += 1
        if count == at:
            partial_of(path).write_text(text[: len(text) // 2])
            die()
        write(path, text)

    report.write_text_atomically = deadly


def process(overrides, death, rank, world_size):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
        if death and rank == death.get("rank", 0) % world_size:
            if "number" in death:
                die_while_journalling(death["number"], death["how"])
            elif "report" in death:
                die_while_reporting(death["report"])
        run(load_settings(COMMAND, overrides))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(code)


def session(overrides, death=None, world_size=1):
    """Run one launch; returns the exit codes of its processes."""
    waiting = {process(overrides, death, rank, world_size) for rank in range(world_size)}
    deadline = time.monotonic() + death["seconds"] if death and "seconds" in death else None
    codes = []
    while waiting:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            waiting.discard(pid)
            codes.append(os.waitstatus_to_exitcode(status))
        if any(codes) or (deadline is not None and time.monotonic() > deadline):
            for other in waiting:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.005)
    return codes


codes = []
for each in plan:
    codes.append(session(each["overrides"], each["death"], each["world_size"]))
print(json.dumps(codes))
'''
TASKS = {
    "two stages": ["benchmark=ceval", "benchmark.limit=3"],
    "choices": ["benchmark=mmlu", "protocol=few_shot_direct", "benchmark.limit=4"],
}
BATCH_SIZES = (1, 3, 16, 128)


def drive(plan: list[dict], folder: Path) -> list[list[int]]:
    done = subprocess.run(
        [*warm_python(), "-c", DRIVER, json.dumps(plan)],
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def results_of(folder: Path) -> tuple[dict, str]:
    """Results and report but for how the run was started, and the checksums over that and over the answers."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for name in ("environment", "checksum", "answers_checksum"):
        assert results.pop(name)
    report, _, how = (folder / "report.md").read_text(encoding="utf-8").partition("## How it was run")
    assert how
    return results, report


def answers_of(folder: Path) -> tuple[list[dict], list[float]]:
    """All answers without their checksums, and apart from them the log-probabilities of all choices."""
    answers = [
        json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert all(answer.pop("checksum") for answer in answers)
    return answers, [value for answer in answers for value in answer.pop("choice_logprobs")]


def assert_alike(folder: Path) -> None:
    killed, whole = folder / "killed", folder / "whole"
    (answers, logprobs), (expected, expected_logprobs) = answers_of(killed), answers_of(whole)
    assert answers == expected
    assert len(logprobs) == 4 * len(answers)
    assert logprobs == pytest.approx(expected_logprobs, rel=0, abs=1e-4)
    assert results_of(killed) == results_of(whole)
    assert not list(killed.glob(".*.partial"))


def sessions_of(task: str, deaths: list[dict | None], world_sizes: list[int]) -> list[dict]:
    """One launch never stopped, then those that die, each with another batch size."""
    common = [*TASKS[task], "benchmark.data_dir=sample", "num_threads=1", "wait_seconds=60"]
    plan = [{"overrides": [*common, "output_dir=whole"], "death": None, "world_size": 1}]
    for number, (death, world_size) in enumerate(zip(deaths, world_sizes, strict=True)):
        batch = f"engine.batch_size={BATCH_SIZES[number % len(BATCH_SIZES)]}"
        plan.append(
            {"overrides": [*common, "output_dir=killed", batch], "death": death, "world_size": world_size}
        )
    return plan


def test_killed_at_the_worst_moments(tmp_path: Path) -> None:
    deaths = [
        {"number": 2, "how": "middle"},
        {"number": 3, "how": "after", "rank": 1},
        {"number": 2, "how": "before"},
        {"report": 0},
        {"report": 3},
        None,
    ]
    codes = drive(sessions_of("two stages", deaths, [1, 2, 1, 1, 1, 1]), tmp_path)
    assert codes[0] == codes[-1] == [0]
    assert all(-9 in session for session in codes[1:-1]), codes
    assert_alike(tmp_path)
    journals = sorted(path.name for path in (tmp_path / "killed").glob("journal-*"))
    assert journals == ["journal-rank0.jsonl", "journal-rank1.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("task", TASKS)
def test_killed_at_ten_random_moments(task: str, seed: int, tmp_path: Path) -> None:
    import random

    chance = random.Random(f"{task} {seed}")
    deaths = [{"seconds": chance.uniform(0.3, 6.0)} for _ in range(10)]
    world_sizes = [chance.choice((1, 1, 2, 3)) for _ in deaths]
    codes = drive(sessions_of(task, [*deaths, None], [*world_sizes, 1]), tmp_path)
    assert codes[0] == codes[-1] == [0]
    assert_alike(tmp_path)
