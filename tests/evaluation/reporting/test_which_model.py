"""Titles, charts, pages, results and labels say which model it was, and how it was asked."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from evaluation.compare.pairing.match import labels, match
from evaluation.compare.pairing.runs import read_run
from evaluation.evaluate import default_run_folder, evaluate_model
from evaluation.reporting.summary import summary_table
from evaluation.running.environment import typed_command
from evaluation.running.fingerprint import deciding, described, fingerprint
from glmtune.terminal.console import Console
from tests.evaluation.doubles import IDENTITY, TableBackend, make_task

TUNED = dataclasses.replace(
    IDENTITY, quantization="int4", adapter="abcdef123456", tuned="prefix runs/my: tuning"
)
WORDS = "table, INT4, prefix runs/my: tuning"


def evaluate(folder: Path, identity=TUNED):
    backend = TableBackend()
    backend.identity = identity
    done = evaluate_model(make_task(), backend, Console(), output_dir=folder)
    assert done is not None
    return done


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, WORDS),
        ({"quantization": "none"}, "table, prefix runs/my: tuning"),
        ({"tuned": ""}, "table, INT4, tuned abcdef12"),
        ({"adapter": "none", "tuned": ""}, "table, INT4"),
        ({"adapter": "unknown", "quantization": "unknown", "tuned": ""}, "table"),
        ({"name": "chatglm2-6b-int4", "adapter": "none"}, "chatglm2-6b-int4"),
    ],
)
def test_a_model_in_words(changes: dict[str, str], words: str) -> None:
    assert described(dataclasses.asdict(dataclasses.replace(TUNED, **changes))) == words


def test_everything_a_run_leaves_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["/usr/bin/glmtune", "eval", "prefix_path=runs/my tuning", "x=http://me:pw@host/v1?api_key=abc"]
    monkeypatch.setattr(sys, "argv", typed)
    done = evaluate(tmp_path)
    values = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert values["title"] == f"Quiz val, test: {WORDS}"
    assert values["model"] == WORDS
    command = "glmtune eval 'prefix_path=runs/my tuning' 'x=http://***host/v1?api_key=***'"
    assert values["environment"]["command"] == typed_command() == command
    assert {"glmtune", "python", "packages", "device"} <= set(values["environment"])
    for name in ("report.md", "mistakes.html"):
        assert WORDS in (tmp_path / name).read_text(encoding="utf-8")
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "How it was run" in report
    assert command in report
    assert summary_table([done], described(done.fingerprint["model"])).title.endswith(WORDS)
    said = dataclasses.replace(done.result.task, own_prompt={"system": "Be brief."})
    own = dataclasses.replace(done, result=dataclasses.replace(done.result, task=said))
    assert [summary_table([each], "m").rows[0][1] for each in (done, own)] == [
        "test",
        "test, own system message",
    ]


def test_the_name_of_a_prefix_makes_no_other_run() -> None:
    task = make_task()
    one, two = (
        fingerprint(task, dataclasses.replace(TUNED, tuned=name), 512) for name in ("prefix a", "prefix b")
    )
    assert deciding(one) == deciding(two)
    assert default_run_folder(one) == default_run_folder(two)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ("FP32, base", "INT4, prefix runs/my: tuning")),
        ({"quantization": "none"}, ("base", "prefix runs/my: tuning")),
        ({"name": "other", "quantization": "none"}, ("base, table", "prefix runs/my: tuning, other")),
    ],
)
def test_labels_say_all_that_differs(tmp_path: Path, changes: dict[str, str], names: tuple[str, str]) -> None:
    evaluate(tmp_path / "one", IDENTITY)
    evaluate(tmp_path / "two", dataclasses.replace(TUNED, **changes))
    pair = read_run(tmp_path / "one"), read_run(tmp_path / "two")
    assert labels(*pair) == names
    assert match(pair[1], pair[0]).title == "Quiz val, test"


def test_two_prefixes_of_one_folder_are_told_apart(tmp_path: Path) -> None:
    evaluate(tmp_path / "one")
    evaluate(tmp_path / "two", dataclasses.replace(TUNED, adapter="0123456789"))
    assert labels(read_run(tmp_path / "one"), read_run(tmp_path / "two")) == (
        "prefix runs/my: tuning (abcdef12)",
        "prefix runs/my: tuning (01234567)",
    )
