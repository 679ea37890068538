"""Questions without an answer: counted, named, not scored, asked again; and results that say so."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from evaluation.evaluate import evaluate_model
from evaluation.running.failed_questions import FailedQuestion, FailureLog, read_failures
from evaluation.running.runner import run_task
from evaluation.sample import Failure
from glmtune.errors import ConfigError, GlmtuneError
from tests.evaluation.doubles import TableBackend, make_task, other_model, run_ranks, timeless


class FailingBackend(TableBackend):
    """Fails at some questions, at the first or the second stage."""

    def __init__(self, *questions: str, stage: str = "generate") -> None:
        super().__init__()
        self.questions, self.stage = questions, stage

    def _with_failures(self, stage, prompts, answers):
        for place, answer in answers:
            text = prompts[place].text or prompts[place].turns[-1].content
            fails = stage == self.stage and any(question in text for question in self.questions)
            yield place, Failure("HTTP 400: too long") if fails else answer

    def generate(self, prompts, limits):
        return self._with_failures("generate", prompts, super().generate(prompts, limits))

    def score_choices(self, prompts, choices):
        return self._with_failures("score", prompts, super().score_choices(prompts, choices))


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("generate", "generate"),
        ("choices", "score"),
        ("generate_then_choices", "generate"),
        ("generate_then_choices", "score"),
    ],
)
def test_the_others_are_answered_and_the_next_start_asks_only_these(kind, stage, tmp_path):
    task = make_task(kind)
    backend = FailingBackend("law question 3", "art question 0", stage=stage)
    finished = run_task(task, backend, tmp_path / "run")
    assert len(finished.answers) == 10
    assert finished.failed == (
        FailedQuestion("law", 3, "HTTP 400: too long"),
        FailedQuestion("art", 0, "HTTP 400: too long"),
    )
    again = TableBackend()
    whole = run_task(task, again, tmp_path / "run")
    assert whole.failed == ()
    assert whole.num_resumed == 10
    stages = 2 if (kind, stage) == ("generate_then_choices", "generate") else 1
    assert len(again.asked) == 2 * stages  # a first stage that is there is not asked again
    assert timeless(whole) == timeless(run_task(task, TableBackend(), tmp_path / "other"))
    assert not list((tmp_path / "run").glob("failed-*"))


def test_a_run_without_any_answer_is_an_error_that_says_why(tmp_path):
    with pytest.raises(GlmtuneError, match=r"None of the 12 questions of Quiz.*`law` 0: HTTP 400: too long"):
        run_task(make_task(), FailingBackend("question"), tmp_path)


def test_results_say_what_is_missing(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    backend = FailingBackend("law question 3", "art question 0")
    done = evaluate_model(make_task(), backend, console, output_dir=tmp_path)
    values = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert values["title"].startswith("PARTIAL Quiz")
    assert values["is_partial"] is True
    assert (values["num_samples"], values["num_failed"]) == (10, 2)
    assert values["failed"][0] == {"subject": "law", "index": 3, "reason": "HTTP 400: too long"}
    assert values["fingerprint"]["num_samples"] == 10  # never paired with a whole run in silence
    assert done.fingerprint["num_samples"] == 12
    for text in (console.file.getvalue(), (tmp_path / "report.md").read_text(encoding="utf-8")):
        words = " ".join(text.split())
        assert "2 of 12 questions failed and are not in these figures" in words
        assert "law 3: HTTP 400: too long" in words
    evaluate_model(make_task(), TableBackend(), console, output_dir=tmp_path)
    values = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert (values["num_samples"], values["num_failed"], values["is_partial"]) == (12, 0, False)


def test_several_processes_wait_for_no_question_that_failed(tmp_path):
    failing = {f"rank{rank}": FailingBackend("art question 6", "law question 1") for rank in range(3)}
    results, errors = run_ranks(tmp_path / "run", 3, **failing)
    assert not errors
    assert [failed.key for failed in results[0][0].failed] == [("law", 1), ("art", 6)]
    assert len(results[0][0].answers) == 10


def test_a_process_with_another_model_adds_nothing(tmp_path):
    """Where a machine of several has another folder under the name, or another server."""
    results, errors = run_ranks(
        tmp_path / "run", 2, rank0=FailingBackend(), rank1=other_model(weights_hash="w1"), wait_seconds=2
    )
    assert isinstance(errors[1], ConfigError)
    assert 'model.weights_hash: "w0" there, "w1" now' in str(errors[1])
    assert "unanswered" in str(errors[0])
    assert not results


def test_a_line_that_is_being_written_is_passed_over(tmp_path):
    log = FailureLog(tmp_path, 2)
    log.append(FailedQuestion("law", 1, "half a pair \ud800, U+2028 \u2028"))
    with log.path.open("ab") as file:
        file.write(b'{"subject": "law", "ind')
    assert list(read_failures(tmp_path)) == [("law", 1)]
