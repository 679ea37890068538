"""`glmtune sweep`: from words to a table; killed and continued; what it refuses before anything starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from glmtune.cli import main
from glmtune.sweep import running
from glmtune.sweep.processes import Ended
from tests.conftest import REPO
from tests.warm.start import warm_python

RATES = "trainer.learning_rate=1e-3,5e-3"
SMALL = (
    "+recipe=ptuning", "prefix.switch=false", "prefix.pre_seq_len=4", "trainer.max_steps=3",
    "trainer.save_steps=1", "trainer.logging_steps=1", "trainer.report_to=[]", "retention=null",
    "data.max_train_samples=32", "data.max_eval_samples=4",
)  # fmt: skip


def in_own_process(words: list[str], folder: Path, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [*warm_python(), "-m", "glmtune", "sweep", *words]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def test_a_sweep_that_was_killed_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL in the second trial of a search: its process ends, too, and the same command does what is missing."""
    pytest.importorskip("optuna")
    words = [*SMALL, "sweep.search=optuna", "sweep.trials=2", f"output_dir={tmp_path / 's'}"]
    space = "trainer.learning_rate=tag(log,interval(1e-4,1e-2))"
    begun = in_own_process([*words, space], tmp_path)
    end = time.monotonic() + 120
    journal, trials = tmp_path / "s" / "sweep.jsonl", tmp_path / "s" / "trials"
    while not (journal.exists() and len(list(trials.glob("*/checkpoint-1/trainer_state.json"))) == 2):
        assert begun.poll() is None, begun.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)
    begun.send_signal(signal.SIGKILL)
    begun.communicate()
    first = trials / json.loads(journal.read_text())["name"]
    made = (first / "all_results.json").stat().st_mtime_ns
    resumed = in_own_process([*words, space], tmp_path)
    said = resumed.communicate(timeout=120)[0]
    assert resumed.returncode == 0, said
    assert (first / "all_results.json").stat().st_mtime_ns == made, "what was trained is not trained again"
    names = {path.name for path in trials.iterdir()}
    assert len(names) == 2, "the search goes on with the point that ran"
    second = trials / (names - {first.name}).pop()
    log = (tmp_path / "s" / "logs" / f"{second.name}.log").read_text()
    # Unless the kill came after the last step of three.
    assert "going on from" in log or "finished at step 3" in log
    assert said.count("$ glmtune train") == 1
    assert f"next: glmtune train {SMALL[0]}" in said
    assert "points chosen by Optuna (TPE)" in said
    assert "one seed a point" in said
    values = json.loads((tmp_path / "s" / "sweep.json").read_text())
    told = {float(point["point"]["trainer.learning_rate"]): point["eval_loss"] for point in values["points"]}
    assert all(1e-4 <= rate <= 1e-2 for rate in told)
    results = json.loads((second / "all_results.json").read_text())
    assert told[rate_of(second)] == results["final_eval_loss"]
    assert main(["sweep", *words, "trainer.learning_rate=tag(log,interval(1e-4,1e-3))"]) == 2
    assert "holds another sweep (space" in capsys.readouterr().err


def rate_of(trial: Path) -> float:
    return float(trial.name.removeprefix("learning_rate=").removesuffix("_seed=42"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that trials were trained with; what they leave is made up: the loss is the learning rate's."""
    ran: list[list[str]] = []

    def run(words: Any, log: Path, waiting: Any = None) -> Ended:
        ran.append(list(words))
        found = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        if found.get("trainer.learning_rate") == "0.9":
            return Ended(1, "glmtune: Memory ran out at step 3")
        folder = Path(found["output_dir"])
        folder.mkdir(parents=True)
        loss = float(found["trainer.learning_rate"]) + int(found["seed"]) / 1e6
        (folder / "all_results.json").write_text(
            json.dumps({"finished": True, "steps": 1, "final_eval_loss": loss})
        )
        return Ended(0, "")

    monkeypatch.setattr(running, "run_command", run)
    return ran


def test_seeds_values_and_failures_are_added(
    tmp_path: Path, trained: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["+recipe=ptuning", f"output_dir={tmp_path / 's'}"]
    assert main(["sweep", *words, "trainer.learning_rate=0.2,0.1"]) == 0
    assert trained[0][1:] == [
        "+recipe=ptuning", "trainer.learning_rate=0.2", "seed=42",
        f"output_dir={tmp_path / 's' / 'trials' / 'learning_rate=0.2_seed=42'}",
    ]  # fmt: skip
    assert "one seed a point" in capsys.readouterr().out
    assert main(["sweep", *words, "trainer.learning_rate=0.2,0.1,0.9", "sweep.repeats=2"]) == 5
    assert [dict(word.split("=", 1) for word in one[2:])["seed"] for one in trained[2:]] == [
        "42",
        "43",
        "43",
        "43",
    ]
    out = capsys.readouterr().out
    assert "best: trainer.learning_rate=0.1 (eval_loss 0.1000)" in out
    assert "! learning_rate=0.9_seed=42: exit code 1: glmtune: Memory ran out at step 3" in out
    assert "all 1 others are significantly worse" in out
    assert out.splitlines()[-1] == (
        f"next: glmtune train +recipe=ptuning trainer.learning_rate=0.1 seed=42 output_dir={tmp_path / 's' / 'best'}"
    )
    assert main(["sweep", *words, "trainer.learning_rate=0.1,0.2"]) == 0
    assert len(trained) == 6, "all is known"


def test_words_of_a_whole_sweep(
    tmp_path: Path, trained: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Aliases, files, `--multirun`, a config folder and a dry run."""
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\ntrainer:\n  max_steps: 7\n")
    words = ["--multirun", "+recipe=mine", "lr=0.2,0.1", f"--config-dir={tmp_path}", "quantization=int4"]
    words.append(f"output_dir={tmp_path / 's'}")
    assert main(["sweep", *words, "sweep.dry_run=true"]) == 0
    dry = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert len(dry) == 2
    assert not trained
    assert not (tmp_path / "s").exists()
    assert main(["sweep", *words]) == 0
    assert trained[0][1:5] == [
        f"--config-dir={tmp_path}",
        "+recipe=mine",
        "model.quantization=int4",
        "trainer.learning_rate=0.2",
    ]
    assert dry[0].endswith(" ".join(trained[0][2:]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["+recipe=ptuning"], "No setting has several values", id="nothing"),
        pytest.param([RATES, "seed=1,2"], "`seed` has several values, but `sweep.repeats=3`", id="seeds"),
        pytest.param([RATES, "output_dir=a,b"], "`output_dir` has several values", id="folders"),
        pytest.param([RATES, "resume=never"], "`resume` is `never`, but a sweep goes on by itself", id="resume"),
        pytest.param([RATES, "sweep.metric=eval_loss,train_loss"], "`sweep.metric` has several values", id="own"),
        pytest.param([RATES, "sweep.metric=rouge"], "`sweep.metric` is `rouge`, which does not exist. Did you mean `rouge-", id="metric"),
        pytest.param([RATES, "sweep.repeats=0"], "`sweep.repeats` is 0", id="repeats"),
        pytest.param([RATES, "sweep.search=random"], "`sweep.search` is `random`", id="search"),
        pytest.param([RATES, "sweep.score_words=[limit]"], "holds `limit`", id="score words"),
        pytest.param([RATES, "sweep.metric=exam", "sweep.score_words=[output_dir=a]"], "holds `output_dir=a`", id="score folder"),
        pytest.param([RATES, "sweep.score_words=[split=test]"], "but training measures `eval_loss` itself", id="score nothing"),
        pytest.param([RATES, "sweep.trials=9"], "`sweep.trials` is 9, but `sweep.search` is `grid`", id="trials"),
        pytest.param([RATES, "hydra.sweeper.n_trials=9"], "`hydra.sweeper.n_trials` is no setting of `glmtune sweep`. Did you mean `sweep.trials`", id="hydra"),
        pytest.param(["trainer.learning_rat=1,2"], "Did you mean `trainer.learning_rate`", id="unknown"),
        pytest.param(["trainer.learning_rate=1e-3,-1,fast"], "2 of the points cannot be trained:\n- trainer.learning_rate=-1: `trainer.learning_rate` is -1", id="values"),
        pytest.param(["+recipe=ptuning,lora", "prefix.pre_seq_len=4,8"], "2 of the points cannot be trained:\n- +recipe=lora", id="together"),
        pytest.param(["+recipe=ptuning,loro"], "`recipe` is `loro`", id="option"),
        pytest.param(["trainer.learning_rate=interval(0,1)"], "but `sweep.search` is `grid`", id="interval"),
        pytest.param([RATES, "sweep.over={trainer.learning_rate: [1, 2]}"], "is given and in `sweep.over`", id="both"),
        pytest.param(["sweep.over={trainer.learning_rate: 1}"], "but it takes a list of values", id="over"),
        pytest.param([RATES, "data.validation_file=null"], "but no rows are kept for evaluation", id="no rows"),
        pytest.param([RATES, "retention=null", "sweep.metric=eval_retention"], "`retention` is null", id="no retention"),
        pytest.param(["+recipe=dpo", "preference.beta=0.1,0.3"], "the points learn by different losses (`preference`), whose values", id="strength of a preference"),
        pytest.param(["+recipe=dpo", "preference=dpo,orpo", "sweep.metric=eval_accuracy"], "a reference or without one", id="no reference"),
        pytest.param(
            [RATES, "sweep.metric=rouge-l", "data=files", "data.mix=[{name:a,train_file:a.jsonl},{name:b,train_file:b.jsonl}]", "data.validation_frac=0.1"],
            "answers the rows of one", id="mixture",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_starts(
    words: list[str], message: str, tmp_path: Path, trained: list[list[str]], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    recipe = [] if any("recipe" in word for word in words) else ["+recipe=ptuning"]
    assert main(["sweep", *recipe, *words]) == 2
    assert message in capsys.readouterr().err
    assert not trained
    assert not list(tmp_path.iterdir())


def test_a_launcher_and_a_file_of_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("tune: prefix\n")
    assert main(["sweep", "--settings", str(tmp_path / "config.yaml")]) == 2
    assert "takes no `--settings`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["trainer.learning_rate=0.1,0.2"], ["preference.beta=0.1,0.3", "sweep.metric=eval_accuracy"]],
    ids=["one loss", "one reference"],
)
def test_preferences_are_compared_by_what_is_alike(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "+recipe=dpo", *words, "sweep.dry_run=true"]) == 0
    assert capsys.readouterr().out.count("$ glmtune train") == 2


def test_another_sweep_is_not_mixed_in(
    tmp_path: Path, trained: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["+recipe=ptuning", f"output_dir={tmp_path / 's'}"]
    assert main(["sweep", *words, "trainer.learning_rate=0.2,0.1"]) == 0
    assert main(["sweep", *words, "trainer.learning_rate=0.2,0.1", "trainer.max_steps=9"]) == 2
    assert "was trained with other settings (trainer.max_steps=9)" in capsys.readouterr().err
    assert main(["sweep", *words, "trainer.learning_rate=0.2,0.1", "prefix.pre_seq_len=4,8"]) == 2
    assert "holds another sweep (settings: ['trainer.learning_rate'] then" in capsys.readouterr().err
    assert len(trained) == 2
