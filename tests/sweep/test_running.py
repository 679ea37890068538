"""The trials of a sweep, with commands that are not run: what is trained, kept, scored, retried and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmtune.errors import GlmtuneError
from glmtune.sweep import running
from glmtune.sweep.metrics import Metric, figures_of_run, metric_of, score_of
from glmtune.sweep.processes import Ended
from glmtune.sweep.running import Runner
from glmtune.sweep.scoring import Score, score_command
from glmtune.sweep.space import Point
from glmtune.sweep.trials import Trial, TrialRecord, known_records, open_sweep

LOSS = Metric("eval_loss", "train", False)
ROUGE = Metric("rouge-l", "predict", True)


class Commands:
    """Stands for the processes: writes what they would leave, and remembers what was asked."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.words: list[list[str]] = []
        self.codes: dict[str, list[int]] = {}

    def __call__(self, words: Any, log: Path, waiting: Callable[[], object] = lambda: None) -> Ended:
        command, *rest = words
        self.words.append(list(words))
        folder = Path(next(word for word in rest if word.startswith("output_dir=")).partition("=")[2])
        self.ran.append(f"{command} {folder.name}")
        waiting()
        code = self.codes.get(folder.name, [0])
        code = code.pop(0) if len(code) > 1 else code[0]
        if code:
            return Ended(code, "glmtune: Memory ran out" if code > 0 else "")
        folder.mkdir(parents=True, exist_ok=True)
        if command == "train":
            results = {"finished": True, "steps": 2, "final_eval_loss": float(folder.name), "run_seconds": 7}
            (folder / "all_results.json").write_text(json.dumps(results))
        else:
            (folder / "predict_results.json").write_text('{"metrics": {"rouge-l": {"value": 31.5}}}')
        return Ended(0, "")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    found = Commands()
    monkeypatch.setattr(running, "run_command", found)
    return found


def trials(folder: Path, *names: str) -> list[Trial]:
    return [
        Trial(
            Point((("p", name),)), 1, folder / "trials" / name, folder / f"{name}.log",
            (f"p={name}", f"output_dir={folder / 'trials' / name}"),
            {"tune": "prefix", "trainer": {"max_steps": 2}, "data": {}, "model": {"source": "glm-tiny"}},
        )
        for name in names
    ]  # fmt: skip


def run(folder: Path, names: str, *, metric: Metric = LOSS, **options: Any) -> Runner:
    with open_sweep(folder, {}) as journal:
        runner = Runner(
            journal,
            known_records(journal),
            metric,
            lambda trial: Score(
                ("predict", f"output_dir={folder / 'scores' / trial.name}"), folder / "scores" / trial.name
            ),
            **options,
        )
        runner.run(iter(trials(folder, *names)), len(names))
    return runner


def test_trials_are_trained_once(
    tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = run(tmp_path / "s", "12")
    assert [runner.value(name) for name in "12"] == [1.0, 2.0]
    assert runner.records["1"].seconds == 7
    said = capsys.readouterr().err
    assert f"$ glmtune train p=1 output_dir={tmp_path / 's' / 'trials' / '1'}" in said
    assert "2: eval_loss 2.0000" in said
    run(tmp_path / "s", "123")
    assert commands.ran == ["train 1", "train 2", "train 3"]


def test_a_trial_that_fails_is_recorded_and_the_rest_go_on(
    tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.codes = {"1": [1, 0], "2": [-9]}
    runner = run(tmp_path / "s", "123")
    assert [runner.value(name) for name in "123"] == [None, None, 3.0]
    assert runner.problem("1") == "exit code 1: glmtune: Memory ran out"
    assert runner.problem("2") == "killed by SIGKILL, as the system does where memory runs out"
    assert (
        f"! 1 failed: exit code 1: glmtune: Memory ran out; see {tmp_path / 's' / '1.log'}"
        in capsys.readouterr().err
    )
    commands.ran.clear()
    run(tmp_path / "s", "123")
    assert commands.ran == [], "what failed is kept as failed"
    runner = run(tmp_path / "s", "123", retry_failed=True)
    assert commands.ran == ["train 1", "train 2"]
    assert runner.value("1") == 1.0


def test_other_words_are_another_trial(tmp_path: Path, commands: Commands) -> None:
    with open_sweep(tmp_path / "s", {}) as journal:
        journal.append(TrialRecord("1", ("p=1", "old=2"), "failed", reason="no"))
    assert run(tmp_path / "s", "1").value("1") == 1.0


def test_a_trial_that_failed_with_other_settings_begins_anew(
    tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else `train` would refuse to go on with what it left, and no word of a sweep could make it."""
    commands.codes = {"1": [75, 0], "2": [0]}
    for name, steps in (("1", 9), ("2", 2)):
        folder = tmp_path / "s" / "trials" / name
        with open_sweep(tmp_path / "s", {}) as journal:
            journal.append(TrialRecord(name, ("p=1", "old=2"), "failed", reason="no"))
        folder.mkdir()
        settings = {**trials(tmp_path / "s", name)[0].settings, "trainer": {"max_steps": steps}}
        (folder / "config.yaml").write_text(json.dumps(settings))
    assert run(tmp_path / "s", "12").value("1") == 1.0
    assert commands.words[0][-1] == "resume=never"
    assert not any("resume=never" in words for words in commands.words[1:]), "once; and for others not at all"
    assert "trials/1 resume=never" in capsys.readouterr().err


def test_it_ends_where_nothing_succeeds(tmp_path: Path, commands: Commands) -> None:
    commands.codes = {name: [2] for name in "1234"}
    with pytest.raises(
        GlmtuneError, match=r"3 trials have failed and none has succeeded .*\n?.*Memory ran out"
    ):
        run(tmp_path / "s", "1234")
    assert commands.ran == ["train 1", "train 2", "train 3"]
    commands.codes = {"2": [2], "3": [2], "4": [2]}
    assert run(tmp_path / "other", "1234").value("1") == 1.0


def test_a_run_that_asks_for_it_is_started_anew(tmp_path: Path, commands: Commands) -> None:
    commands.codes = {"1": [75, 75, 0]}
    assert run(tmp_path / "s", "1").value("1") == 1.0
    assert commands.ran == ["train 1"] * 3


def test_a_run_that_was_stopped_is_no_failure(tmp_path: Path, commands: Commands) -> None:
    commands.codes = {"2": [143, 0]}
    with pytest.raises(GlmtuneError, match=r"2 was stopped by signal 15\. The same command goes on"):
        run(tmp_path / "s", "12")
    assert run(tmp_path / "s", "12").value("2") == 2.0
    assert commands.ran == ["train 1", "train 2", "train 2"]


@pytest.mark.parametrize("code", [255, 0xC0000005], ids=["minus-one", "crash-on-windows"])
def test_large_exit_codes_are_failures(code: int, tmp_path: Path, commands: Commands) -> None:
    commands.codes = {"1": [code]}
    runner = run(tmp_path / "s", "12")
    assert (runner.value("1"), runner.value("2")) == (None, 2.0)
    assert runner.problem("1") == f"exit code {code}: glmtune: Memory ran out"


@pytest.mark.parametrize("name", ["nan", "inf"])
def test_a_run_that_ended_outside_all_numbers_is_not_the_best(
    name: str, tmp_path: Path, commands: Commands
) -> None:
    with open_sweep(tmp_path / "s", {}) as journal:
        runner = Runner(journal, {}, LOSS, lambda trial: Score((), tmp_path))
        runner.run(trials(tmp_path / "s", name, "2"), 2)
    assert (runner.value(name), runner.value("2")) == (None, 2.0)
    assert runner.problem(name) == f"its results tell eval_loss {name}"


def test_a_score_is_measured_by_its_own_command_also_later(tmp_path: Path, commands: Commands) -> None:
    run(tmp_path / "s", "1")
    runner = run(tmp_path / "s", "12", metric=ROUGE)
    assert commands.ran == ["train 1", "predict 1", "train 2", "predict 2"]
    assert runner.records["1"].figures == {"eval_loss": 1.0, "rouge-l": 31.5}
    assert run(tmp_path / "s", "12").value("2") == 2.0
    assert len(commands.ran) == 4


def test_a_score_that_fails_is_tried_again(tmp_path: Path, commands: Commands) -> None:
    run(tmp_path / "s", "1")
    commands.codes = {"1": [5, 0]}
    runner = run(tmp_path / "s", "1", metric=ROUGE)
    assert (runner.value("1"), runner.problem("1")) == (
        None,
        "`glmtune predict`: exit code 5: glmtune: Memory ran out",
    )
    assert run(tmp_path / "s", "1", metric=ROUGE).value("1") == 31.5


def test_a_run_that_measured_something_else(tmp_path: Path, commands: Commands) -> None:
    runner = run(tmp_path / "s", "1", metric=Metric("eval_accuracy", "train", True))
    assert runner.value("1") is None
    assert runner.problem("1") == "its results tell no eval_accuracy"


@pytest.mark.parametrize(
    ("name", "command", "larger"),
    [("eval_loss", "train", False), ("eval_retention", "train", True), ("bleu-4", "predict", True), ("exam", "eval", True), ("my.yaml", "eval", True)],
)  # fmt: skip
def test_metrics_know_their_command_and_direction(name: str, command: str, larger: bool) -> None:
    found = metric_of(name, ["exam", "ceval"])
    assert (found.command, found.is_larger_better) == (command, larger)


def test_figures_are_read_from_what_commands_leave(tmp_path: Path) -> None:
    results = {"final_eval_loss": 1, "best_eval_loss": None, "final_eval_retention": 0.5, "steps": 3}
    assert figures_of_run(results) == {"eval_loss": 1.0, "eval_retention": 0.5}
    (tmp_path / "results.json").write_text(
        '{"headline": "accuracy_macro", "accuracy_macro": 0.25, "accuracy_micro": 1}'
    )
    assert score_of(Metric("exam", "eval", True), tmp_path) == 25
    with pytest.raises(ValueError, match=r"predict_results\.json holds no rouge-l"):
        score_of(ROUGE, tmp_path)
    (tmp_path / "results.json").write_text('{"headline": "accuracy_macro", "accuracy_macro": null}')
    with pytest.raises(ValueError, match="holds no exam"):
        score_of(Metric("exam", "eval", True), tmp_path)


@pytest.mark.parametrize(
    ("tune", "expected"),
    [
        pytest.param("prefix", ["prefix_path=T", "model=m"], id="prefix"),
        pytest.param("lora", ["adapter_path=T", "model=m"], id="lora"),
        pytest.param("full", ["model=T/last"], id="full"),
    ],
)
def test_the_command_that_scores_names_what_was_trained(
    tune: str, expected: list[str], tmp_path: Path
) -> None:
    data = {"train_file": "a.jsonl", "validation_frac": 0.1, "cache": False, "prompt_column": None}
    data |= {"streaming": True, "shuffle_buffer": 9, "mix": [{"name": "a"}]}
    settings = {
        "tune": tune,
        "model": {"source": "m", "quantization": None, "quantization_bit": None},
        "data": data,
    }
    trial = Trial(Point(()), 1, tmp_path / "T", tmp_path / "log", (), settings)
    found = score_command(trial, Metric("exam", "eval", True), ["benchmark.limit=3"], tmp_path / "scores")
    words = [word.replace(f"{tmp_path}/", "") for word in found.words]
    assert words == ["eval", *expected, "benchmark=exam", "benchmark.limit=3", "output_dir=scores/T/exam"]
    words = list(score_command(trial, ROUGE, [], tmp_path).words)
    assert words[-5:-1] == [
        "data=files",
        "data.train_file=a.jsonl",
        "data.validation_frac=0.1",
        "split=validation",
    ]
