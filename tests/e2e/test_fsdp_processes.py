"""Two real processes under FSDP2: they equal one process, and either goes on where the other stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

from tests.conftest import REPO

ONE = "trainer.per_device_train_batch_size=4"  # the rows that two processes take together
TWO = "trainer.per_device_train_batch_size=2"
FSDP = "distributed=fsdp"
FULL, PREFIX, LORA = "+recipe=full", "+recipe=ptuning", "+recipe=lora"
# 37 rows, 8 in a step: the last step of an epoch has 5, its last forward pass a single one for two processes.
COMMON = [
    *("data=files", "data.layout=adgen", "data.max_train_samples=37", "resume=force", "seed=3"),
    *("trainer.learning_rate=1e-3", "trainer.max_steps=8", "trainer.gradient_accumulation_steps=2"),
    *("trainer.logging_steps=1", "trainer.save_steps=4", "trainer.report_to=[]"),
]
CALM = ["lora.dropout=0", "prefix.dropout=0"]  # every process draws its own random numbers
SLOW = pytest.mark.skipif(os.environ.get("GLMTUNE_SLOW") != "1", reason="slow: set GLMTUNE_SLOW=1")


@dataclass
class Story:
    """Sessions that were run: where, and the exit codes of each."""

    folder: Path
    codes: dict[str, list[int]]

    def said(self, name: str, rank: int) -> str:
        return (self.folder / f"{name}-{rank}.log").read_text(errors="replace")

    def log(self, run: str) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in (self.folder / run / "trainer_log.jsonl").read_text().splitlines()
        ]

    def losses(self, run: str) -> list[float]:
        return [entry["loss"] for entry in self.log(run) if "loss" in entry]

    def weights(self, run: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path in (self.folder / run / "last").glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return found

    def assert_equal(self, run: str, other: str) -> None:
        for name in (run, other):
            assert set(self.codes[name]) == {0}, self.said(name, 0)[-3000:]
        assert len(self.losses(run)) == 8
        assert self.losses(run) == pytest.approx(self.losses(other), rel=2e-5)
        mine, theirs = self.weights(run), self.weights(other)
        assert mine.keys() == theirs.keys() != set()
        for name, weight in mine.items():
            assert (weight - theirs[name]).abs().max() < 2e-4, name


def run_sessions(
    folder: Path, base: list[str], plan: list[tuple[str, int, list[str], dict[str, Any]]]
) -> Story:
    """Run sessions, each given as name, number of processes, overrides, and what befalls it."""
    sessions = [
        {
            "name": name,
            "count": count,
            "overrides": [
                *overrides[:1],
                *base,
                ONE if count == 1 else TWO,
                f"output_dir={fate.pop('run', name)}",
                *overrides[1:],
            ],
            **fate,
        }
        for name, count, overrides, fate in plan
    ]
    (folder / "plan.json").write_text(json.dumps(sessions))
    done = subprocess.run(
        [sys.executable, str(REPO / "tests" / "e2e" / "sessions.py"), str(folder / "plan.json")],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300 * len(plan),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text())
    return Story(folder, {name: result["codes"] for name, result in results.items()})


@pytest.fixture(scope="module")
def base(tiny_base: Path, tiny_rows: dict[str, Path]) -> list[str]:
    files = [f"data.{name}_file={tiny_rows[name]}" for name in ("train", "validation")]
    return [*COMMON, f"model.source={tiny_base}", *files]


@pytest.fixture(scope="module")
def story(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Story:
    plan = [
        ("one", 1, [FULL], {}),
        ("two", 2, [FULL, FSDP], {}),
        ("from-two", 1, [FULL, "resume=two/checkpoint-4"], {}),
        ("from-one", 2, [FULL, FSDP, "resume=one/checkpoint-4"], {}),
        ("alone", 1, [FULL, FSDP], {}),
        ("spoilt", 2, [FULL], {"fate": "not_finite", "step": 6}),
    ]
    return run_sessions(tmp_path_factory.mktemp("fsdp"), base, plan)


def test_two_processes_equal_one(story: Story) -> None:
    story.assert_equal("two", "one")


def test_one_process_goes_on_from_two(story: Story) -> None:
    assert story.codes["from-two"] == [0], story.said("from-two", 0)[-3000:]
    assert story.losses("from-two") == pytest.approx(story.losses("one")[4:], rel=2e-5)


def test_two_processes_go_on_from_one(story: Story) -> None:
    assert story.codes["from-one"] == [0, 0], story.said("from-one", 0)[-3000:]
    assert story.losses("from-one") == pytest.approx(story.losses("one")[4:], rel=2e-5)


def test_one_process_has_nothing_to_divide(story: Story) -> None:
    assert story.codes["alone"] == [2]
    assert "this run has one process" in story.said("alone", 0)
    assert "launch.num_processes" in story.said("alone", 0)


def test_a_loss_not_finite_in_one_process_sends_all_back(story: Story) -> None:
    assert story.codes["spoilt"] == [0, 0], story.said("spoilt", 0)[-3000:] + story.said("spoilt", 1)[-3000:]
    alert = next(entry for entry in story.log("spoilt") if entry.get("alert") == "rollback")
    assert (alert["step"], alert["failed_step"]) == (4, 6)
    rates = [entry["learning_rate"] for entry in story.log("spoilt") if "loss" in entry]
    plain = [entry["learning_rate"] for entry in story.log("one") if "loss" in entry]
    assert rates == pytest.approx([*plain[:4], *(rate / 2 for rate in plain[4:])])


@SLOW
def test_prefix_and_adapters(base: list[str], tmp_path: Path) -> None:
    plan = [
        ("prefix-one", 1, [PREFIX, CALM[1]], {}),
        ("prefix-two", 2, [PREFIX, CALM[1], FSDP], {}),
        ("lora-one", 1, [LORA, CALM[0]], {}),
        ("lora-two", 2, [LORA, CALM[0], FSDP], {}),
    ]
    story = run_sessions(tmp_path, base, plan)
    story.assert_equal("prefix-two", "prefix-one")
    story.assert_equal("lora-two", "lora-one")


@SLOW
def test_divided_and_not_finite_the_same_command_goes_back(base: list[str], tmp_path: Path) -> None:
    spoilt = {"fate": "not_finite", "step": 6}
    plan = [("first", 2, [FULL, FSDP], {"run": "run", **spoilt}), ("second", 2, [FULL, FSDP], {"run": "run"})]
    story = run_sessions(tmp_path, base, plan)
    assert 0 not in story.codes["first"]
    assert "The same command starts anew, going back from step 6 to checkpoint-4" in story.said("first", 0)
    assert story.codes["second"] == [0, 0]
    assert any(entry.get("alert") == "rollback" for entry in story.log("run"))
