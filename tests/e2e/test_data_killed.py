"""A run of kept rows, of a mixture or of streamed rows that is killed within an epoch repeats exactly."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.e2e.test_train_killed import COMMON, DRIVER, METHODS, learnt
from tests.warm.start import warm_python

DEATHS = ["before the first checkpoint", "between two micro-batches", "while a checkpoint is written"]
LENGTHS = ["data.max_source_length=60", "data.max_target_length=40"]


def ways(rows: dict[str, Path], folder: Path) -> dict[str, list[str]]:
    """Overrides by how the rows are read: 132 of them are learnt, several times as many as there are."""
    talks = folder / "talks.jsonl"
    talks.write_text(
        "\n".join(json.dumps({"prompt": f"{n} + {n}", "response": f"= {2 * n}"}) for n in range(17)),
        encoding="utf-8",
    )
    train, held_out = rows["train"], rows["validation"]
    mix = (
        f"data.mix=[{{name:ads,weight:1,layout:adgen,train_file:'{train}',validation_file:'{held_out}'}},"
        f"{{name:sums,weight:2,layout:columns,prompt_column:prompt,response_column:response,"
        f"train_file:'{talks}',validation_file:'{talks}'}}]"
    )
    alone = ["data.layout=adgen", f"data.train_file={train}", f"data.validation_file={held_out}"]
    return {
        "cached": [*alone, "data.cache=always", f"data.cache_dir={folder / 'cache'}", "data.num_workers=2"],
        "mix": ["data.layout=auto", mix],
        "packed mix": ["data.layout=auto", mix, *LENGTHS, "data.packing=true", "data.packing_length=128"],
        "streaming": [*alone, *LENGTHS, "data.streaming=true", "data.shuffle_buffer=9"],
    }


@pytest.fixture(scope="module")
def sessions(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[int]], str]:
    folder = tmp_path_factory.mktemp("data-killed")
    plan: dict[str, Any] = {}
    for name, words in ways(tiny_rows, folder).items():
        runs = {which: str(folder / name / which) for which in ("reference", "killed")}
        common = [word for word in COMMON if not word.startswith("data.layout")]
        overrides = [*METHODS["prefix"][:3], *common, f"model.source={tiny_base}", "retention=null"]
        plan[name] = {**runs, "deaths": DEATHS, "overrides": [*overrides, "prefix.switch=false", *words]}
    done = subprocess.run(
        [*warm_python(), "-c", DRIVER, json.dumps(plan)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("way", ["cached", "mix", "packed mix", "streaming"])
def test_a_killed_run_repeats_exactly(sessions: tuple[Path, dict[str, list[int]], str], way: str) -> None:
    folder, codes, errors = sessions
    assert codes[way] == [0, *(-9 for _ in DEATHS), 0], errors[-4000:]
    reference, killed = (folder / way / which for which in ("reference", "killed"))
    log = learnt(reference / "trainer_log.jsonl")
    assert learnt(killed / "trainer_log.jsonl") == log
    assert max(entry["step"] for entry in log) == 22
    ours, theirs = (load_file(next((run / "last").glob("*.safetensors"))) for run in (killed, reference))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_evaluation_reports_the_sets_of_a_mixture_apart(
    sessions: tuple[Path, dict[str, list[int]], str],
) -> None:
    entries = learnt(sessions[0] / "mix" / "reference" / "trainer_log.jsonl")
    evaluated = [entry for entry in entries if "eval_loss" in entry]
    assert len(evaluated) > 2
    for entry in evaluated:
        tokens = [entry[f"eval_{name}_tokens"] for name in ("ads", "sums")]
        losses = [entry[f"eval_{name}_loss"] for name in ("ads", "sums")]
        assert sum(tokens) == entry["eval_tokens"]
        mean = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
        assert mean == pytest.approx(entry["eval_loss"], rel=1e-9)
        assert losses[0] != losses[1]


def test_rows_are_encoded_once_for_all_sessions(sessions: tuple[Path, dict[str, list[int]], str]) -> None:
    kept = list((sessions[0] / "cache").iterdir())
    assert len(kept) == 3, "lengths of training rows, training rows, rows for evaluation"
