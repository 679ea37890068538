"""The runner: what is asked, kept, continued and shared among processes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from evaluation.fewshot import Exemplar, FewShot
from evaluation.running.data_parallel import Processes
from evaluation.running.fitting import fit_extraction, fit_prompt
from evaluation.running.run_folder import journal_path, read_journals
from evaluation.running.runner import run_task
from glmtune.errors import ConfigError, GlmtuneError
from glmtune.storage.journal import Journal
from tests.evaluation.doubles import Stopped, TableBackend, make_task, other_model, run_ranks, timeless

KINDS = ("generate", "choices", "generate_then_choices")


@pytest.mark.parametrize("kind", KINDS)
def test_all_questions_are_answered_in_the_order_of_the_data(kind, tmp_path):
    task = make_task(kind)
    finished = run_task(task, TableBackend(reverse=True), tmp_path)
    assert [answer.key for answer in finished.answers] == [sample.key for sample in task.samples]
    assert all((answer.completion is None) == (kind == "choices") for answer in finished.answers)
    assert all((answer.choice_logprobs is None) == (kind == "generate") for answer in finished.answers)
    second = finished.answers[1]
    assert (
        second.extracted
        == {
            "generate": {"official": "B", "strict": "B"},
            "choices": {"choice": "B"},
            "generate_then_choices": {"choice": "B", "official": "B", "strict": "B"},
        }[kind]
    )
    assert len(second.prompt_hash) == 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fail_after", [0, 1, 4, 11, 13, 20])
def test_a_stopped_run_goes_on_without_asking_twice(kind, fail_after, tmp_path):
    task = make_task(kind)
    whole = run_task(task, TableBackend(), tmp_path / "whole")
    dying = TableBackend(fail_after=fail_after)
    total = 24 if kind == "generate_then_choices" else 12
    if fail_after < total:
        with pytest.raises(Stopped):
            run_task(task, dying, tmp_path / "run")
    else:
        run_task(task, dying, tmp_path / "run")
    rest = TableBackend(reverse=True)
    finished = run_task(task, rest, tmp_path / "run")
    assert timeless(finished) == timeless(whole)
    assert len(dying.asked) + len(rest.asked) == total
    assert not set(dying.asked) & set(rest.asked)
    again = TableBackend()
    assert timeless(run_task(task, again, tmp_path / "run")) == timeless(whole)
    assert again.asked == []


def test_without_exemplars_questions_are_passed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.running.runner.CHUNK_SAMPLES", 8)
    zero = TableBackend()
    run_task(make_task("generate_then_choices"), zero, tmp_path)
    assert [call[:2] for call in zero.calls] == [("generate", 8), ("score", 8), ("generate", 4), ("score", 4)]


SIZES = {"law": 5, "art": 7, "sea": 4}


@pytest.mark.parametrize(("most", "sizes"), [(1024, [16]), (12, [12, 4]), (7, [5, 7, 4]), (1, [5, 7, 4])])
def test_with_exemplars_whole_subjects_are_passed_together(most, sizes, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.running.runner.CHUNK_FEWSHOT_SAMPLES", most)
    few = TableBackend()
    run_task(make_task("choices", num_fewshot=3, sizes=SIZES), few, tmp_path)
    assert [size for _, size, _ in few.calls] == sizes


def test_subjects_with_the_same_exemplars_are_passed_together_however_many_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.running.runner.CHUNK_FEWSHOT_SAMPLES", 6)
    task = make_task("generate", num_fewshot=2, sizes=SIZES)
    same, other = (Exemplar("1+1?", " 2"), Exemplar("1+2?", " 3")), (Exemplar("5+5?", " 10"),)
    shots = {"law": [*same, *other], "art": other, "sea": same}  # of the first, the third is not shown
    prepared = dataclasses.replace(task.prepared, few_shot=FewShot(shots, lambda sample: sample.question))
    task = dataclasses.replace(task, prepared=prepared)
    few = TableBackend()
    finished = run_task(task, few, tmp_path)
    assert [size for _, size, _ in few.calls] == [9, 7]
    assert [answer.key for answer in finished.answers] == [sample.key for sample in task.samples]


def test_another_model_may_not_continue(tmp_path):
    with pytest.raises(Stopped):
        run_task(make_task(), TableBackend(fail_after=3), tmp_path)
    with pytest.raises(ConfigError, match=r'model.weights_hash: "w0" there, "w1" now.*resume=false'):
        run_task(make_task(), other_model(weights_hash="w1"), tmp_path)
    renamed = run_task(make_task(), other_model(name="elsewhere"), tmp_path)
    assert renamed.num_resumed == 3
    with pytest.raises(ConfigError, match=r"num_fewshot: 0 there, 2 now"):
        run_task(make_task(num_fewshot=2), TableBackend(), tmp_path)
    anew = run_task(make_task(), other_model(weights_hash="w1"), tmp_path, resume=False)
    assert anew.num_resumed == 0


class TestPromptsThatAreTooLong:
    def test_exemplars_are_lost_and_the_question_never(self):
        task = make_task(num_fewshot=5)
        sample = task.samples[0]
        bare = len(task.prompt(sample, 0).text)
        shot = len("Q: exemplar 0\nA: C\n")
        for context, shots in ((bare + 16 + 5 * shot, 5), (bare + 16 + 5 * shot - 1, 4), (bare + 16, 0)):
            asked = fit_prompt(task, sample, TableBackend(context=context))
            assert asked.prompt.num_fewshot == shots
            assert asked.max_new_tokens == 16
            assert asked.prompt.text.endswith(f"Q: {sample.question}\nA:")

    def test_then_room_to_generate_is_lost(self, tmp_path):
        task = make_task()
        bare = len(task.prompt(task.samples[0]).text)
        asked = fit_prompt(task, task.samples[0], TableBackend(context=bare + 7))
        assert (asked.prompt.num_fewshot, asked.max_new_tokens) == (0, 7)
        backend = TableBackend(context=bare + 7)
        run_task(task, backend, tmp_path)
        assert {limits.max_new_tokens for _, _, limits in backend.calls} == {7}

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_question_that_no_context_holds_is_counted_not_cut(self, kind, tmp_path):
        task = make_task(kind, sizes={"law": 2, "a much longer subject": 1})
        bare = len(task.prompt(task.samples[0]).text)
        finished = run_task(task, TableBackend(context=bare + 17), tmp_path)
        assert [answer.stop_reason == "too_long" for answer in finished.answers] == [False, False, True]
        assert run_task(task, TableBackend(context=bare + 17, fail_after=0), tmp_path).num_resumed == 3

    def test_a_completion_is_cut_at_its_end_before_the_cue(self):
        task = make_task("generate_then_choices")
        sample = task.samples[0]
        empty = len(task.extraction_prompt(sample, "").turns[0].content)
        prompt = fit_extraction(task, sample, "x" * 500 + "END", TableBackend(context=empty + 41))
        assert prompt == task.extraction_prompt(sample, "x" * 40)
        assert fit_extraction(task, sample, "xyz", TableBackend(context=empty)) is None


class TestProcesses:
    @pytest.mark.parametrize("kind", KINDS)
    def test_shares_make_the_whole(self, kind, tmp_path):
        task = make_task(kind)
        results, errors = run_ranks(tmp_path / "run", 3, task)
        assert not errors
        assert results[1][0] is results[2][0] is None
        assert timeless(results[0][0]) == timeless(run_task(task, TableBackend(), tmp_path / "one"))
        stages = 2 if kind == "generate_then_choices" else 1
        assert [len(backend.asked) for _, backend in (results[rank] for rank in range(3))] == [4 * stages] * 3
        assert len(list((tmp_path / "run").glob("journal-rank*.jsonl"))) == 3

    def test_any_number_of_processes_goes_on_with_what_is_unanswered(self, tmp_path):
        with pytest.raises(Stopped):
            run_task(make_task(), TableBackend(fail_after=5), tmp_path)
        (tmp_path / ".hello-1").write_text(json.dumps({"nonce": "of a killed launch"}))
        (tmp_path / ".plan.json").write_text(json.dumps({"hellos": {"1": "old"}, "shares": [[], []]}))
        results, errors = run_ranks(tmp_path, 2)
        assert not errors
        assert [len(results[rank][1].asked) for rank in range(2)] == [4, 3]
        assert timeless(results[0][0]) == timeless(run_task(make_task(), TableBackend(), tmp_path / "one"))

    def test_waiting_ends_with_a_message(self, tmp_path):
        waiting = Processes(0, 2, wait_seconds=0.2)
        with pytest.raises(GlmtuneError, match=r"waited 0.2 seconds .*process 1 of 2 did not appear"):
            run_task(make_task(), TableBackend(), tmp_path, processes=waiting)
        with pytest.raises(GlmtuneError, match=r"process 1 waited .*process 0, which opens the run"):
            run_task(make_task(), TableBackend(), tmp_path / "b", processes=Processes(1, 2, wait_seconds=0.2))
        keys = [sample.key for sample in make_task().samples]
        with pytest.raises(GlmtuneError, match=r"3 of 12 questions are unanswered \(first: \('art', 4\)\)"):
            waiting.wait_for_answers(keys, lambda: set(keys[:-3]))

    def test_the_environment_of_torchrun_is_read(self, monkeypatch):
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert Processes.from_environment(5) == Processes(0, 1, 5)
        monkeypatch.setenv("RANK", "2")
        with pytest.raises(ConfigError, match="RANK=2 and WORLD_SIZE=1"):
            Processes.from_environment(5)
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert Processes.from_environment(5) == Processes(2, 3, 5)
        monkeypatch.setenv("RANK", "two")
        with pytest.raises(ConfigError, match="RANK=two"):
            Processes.from_environment(5)


def test_a_first_stage_in_the_journal_is_not_asked_again(tmp_path):
    task = make_task("generate_then_choices")
    with pytest.raises(Stopped):
        run_task(task, TableBackend(fail_after=7), tmp_path)
    assert all(answer.choice_logprobs is None for answer in read_journals(tmp_path).values())
    rest = TableBackend()
    assert run_task(task, rest, tmp_path).num_resumed == 0
    assert [call[:2] for call in rest.calls] == [("generate", 5), ("score", 12)]


def test_a_writer_of_an_earlier_launch_is_refused(tmp_path):
    run_task(make_task(), TableBackend(), tmp_path)
    with Journal(journal_path(tmp_path, 0)), pytest.raises(ConfigError, match="another process"):
        run_task(make_task(), TableBackend(), tmp_path)
