"""A run goes on with more questions than it began with, and asks only those it has no answer to."""

from __future__ import annotations

import dataclasses

import pytest

from evaluation.benchmarks.tasks import BENCHMARKS
from evaluation.benchmarks.tasks import make_task as benchmark_task
from evaluation.evaluate import default_run_folder, evaluate_model
from evaluation.running.data_parallel import Processes
from evaluation.running.fingerprint import fingerprint
from evaluation.running.run_folder import read_journals
from evaluation.running.runner import run_task
from evaluation.task import hash_prompt
from glmtune.errors import ConfigError
from glmtune.storage.json_files import read_json_object
from glmtune.terminal.console import Console
from tests.evaluation.doubles import Stopped, TableBackend, make_task, other_model, run_ranks, timeless

KINDS = ("generate", "choices", "generate_then_choices")
FEW, MORE = {"law": 2, "art": 3}, {"law": 5, "art": 3, "sea": 4}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fail_after", [None, 3])
def test_only_new_questions_are_asked(kind, fail_after, tmp_path):
    first = TableBackend(fail_after=fail_after)
    if fail_after is None:
        run_task(make_task(kind, sizes=FEW), first, tmp_path / "run")
    else:
        with pytest.raises(Stopped):
            run_task(make_task(kind, sizes=FEW), first, tmp_path / "run")
    rest = TableBackend(reverse=True)
    finished = run_task(make_task(kind, sizes=MORE), rest, tmp_path / "run")
    stages = 2 if kind == "generate_then_choices" else 1
    assert len(first.asked) + len(rest.asked) == 12 * stages
    assert not set(first.asked) & set(rest.asked)
    whole = run_task(make_task(kind, sizes=MORE), TableBackend(), tmp_path / "whole")
    assert timeless(finished) == timeless(whole)
    again = TableBackend()
    assert run_task(make_task(kind, sizes=MORE), again, tmp_path / "run").num_resumed == 12
    assert again.asked == []


def test_fewer_questions_are_refused_with_the_way_out(tmp_path):
    run_task(make_task(sizes=MORE), TableBackend(), tmp_path)
    words = (
        r"holds 12 answers, of which 7 are to questions that are not asked now \(first: `law` 2\)"
        r".*`completions=.*resume=false"
    )
    with pytest.raises(ConfigError, match=words):
        run_task(make_task(sizes=FEW), TableBackend(), tmp_path)
    assert len(read_journals(tmp_path)) == 12


def test_other_prompts_and_other_ways_to_ask_are_refused(tmp_path):
    run_task(make_task(sizes=FEW), TableBackend(), tmp_path)
    task = make_task(sizes=MORE)
    reworded = [dataclasses.replace(sample, question=f"So: {sample.question}") for sample in task.samples]
    reworded[0] = task.samples[0]
    other = dataclasses.replace(task, samples=tuple(reworded))
    with pytest.raises(ConfigError, match=r"of which 4 are to other prompts than now \(first: `law` 1\)"):
        run_task(other, TableBackend(), tmp_path)
    with pytest.raises(ConfigError, match=r"num_fewshot: 0 there, 2 now"):
        run_task(make_task(sizes=MORE, num_fewshot=2), TableBackend(), tmp_path)
    with pytest.raises(ConfigError, match=r'model.weights_hash: "w0" there, "w1" now'):
        run_task(task, other_model(weights_hash="w1"), tmp_path)


def test_a_corrected_key_is_scored_anew_and_nothing_is_asked(tmp_path):
    task = make_task(sizes=FEW)
    before = run_task(task, TableBackend(), tmp_path)
    keys = tuple(dataclasses.replace(sample, answer="D") for sample in task.samples)
    backend = TableBackend()
    after = run_task(dataclasses.replace(task, samples=keys), backend, tmp_path)
    assert backend.asked == []
    assert timeless(after) == timeless(before)


def test_questions_too_long_to_be_asked_go_on_as_such(tmp_path):
    few, more = {"a much longer subject": 1, "law": 1}, {"a much longer subject": 2, "law": 2}
    context = len(make_task(sizes=few).prompt(make_task(sizes=few).samples[1]).text) + 17
    run_task(make_task(sizes=few), TableBackend(context=context), tmp_path)
    finished = run_task(make_task(sizes=more), TableBackend(context=context), tmp_path)
    assert finished.num_resumed == 2
    assert [answer.stop_reason == "too_long" for answer in finished.answers] == [True, True, False, False]


def test_several_processes_go_on(tmp_path):
    run_task(make_task(sizes=FEW), TableBackend(), tmp_path)
    results, errors = run_ranks(tmp_path, 2, make_task(sizes=MORE))
    assert not errors
    assert [len(results[rank][1].asked) for rank in range(2)] == [4, 3]
    assert len(results[0][0].answers) == 12


class TestDefaultFolders:
    """Each set of questions has a folder of its own, and takes over what the others have answered."""

    @pytest.fixture(autouse=True)
    def _here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def _evaluate(self, sizes, backend, **options):
        return evaluate_model(make_task(sizes=sizes), backend, Console(quiet=True), **options)

    def test_answers_are_taken_over_in_both_directions(self):
        few = self._evaluate(FEW, TableBackend())
        rest = TableBackend()
        more = self._evaluate(MORE, rest)
        assert more.folder != few.folder
        assert len(rest.asked) == 7
        assert len(more.result.task.samples) == 12
        for sizes in ({"sea": 1}, {"law": 4, "sea": 2}):
            none = TableBackend()
            self._evaluate(sizes, none)
            assert none.asked == []
        folder = default_run_folder(fingerprint(make_task(sizes=FEW), TableBackend().identity, 10_000))
        assert few.folder == folder
        assert read_json_object(few.folder / "timing.json")["num_resumed"] == 0
        assert read_json_object(more.folder / "timing.json")["num_resumed"] == 5

    def test_what_is_taken_over_is_said(self, capsys):
        few = self._evaluate(FEW, TableBackend())
        evaluate_model(make_task(sizes=MORE), TableBackend(), Console())
        assert f"5 answers are taken over from {few.folder}." in capsys.readouterr().out

    def test_resume_false_and_named_folders_take_nothing_over(self, tmp_path):
        self._evaluate(FEW, TableBackend())
        for options in ({"resume": False}, {"output_dir": tmp_path / "named"}):
            backend = TableBackend()
            self._evaluate(MORE, backend, **options)
            assert len(backend.asked) == 12

    def test_other_models_damage_and_half_answers_are_passed_over(self):
        few = self._evaluate(FEW, other_model(weights_hash="w1"))
        backend = TableBackend()
        same_words = few.folder.with_name(few.folder.name[:-8] + "00000000")
        few.folder.rename(same_words)
        self._evaluate(MORE, backend)
        assert len(backend.asked) == 12
        (same_words / "run.json").write_text("{")
        backend = other_model(weights_hash="w1")
        self._evaluate(FEW, backend)
        assert len(backend.asked) == 5

    def test_the_first_process_takes_over_for_all(self):
        self._evaluate(FEW, TableBackend())
        task, backend = make_task(sizes=MORE), TableBackend()
        folder = default_run_folder(fingerprint(task, backend.identity, 10_000))
        beside = [path for path in folder.parent.iterdir() if path != folder]
        assert len(beside) == 1
        finished = run_task(task, backend, folder, processes=Processes(), beside=beside)
        assert (finished.num_resumed, len(backend.asked)) == (5, 7)


# mgsm_zh and math ship no questions, and math500 and ifeval need an extra.
@pytest.mark.parametrize("name", sorted({*BENCHMARKS} - {"mgsm_zh", "math", "math500", "ifeval"}))
@pytest.mark.parametrize("is_chat", [True, False])
def test_the_number_of_exemplars_in_an_answer_gives_its_prompt_back(name, is_chat):
    for protocol in BENCHMARKS[name].protocols:
        task = benchmark_task(name, protocol=protocol, data_dir="sample", is_chat=is_chat)
        for sample in task.samples[:: max(1, len(task.samples) // 5)]:
            for count in {0, task.num_fewshot // 2, task.num_fewshot}:
                prompt = task.prompt(sample, count)
                assert hash_prompt(task.prompt(sample, prompt.num_fewshot)) == hash_prompt(prompt)
