"""Finished runs and predictions, damaged or edited: compared and scored as they were, or refused by name."""

from __future__ import annotations

import contextlib
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evaluation.benchmarks.tasks import make_task as make_benchmark
from evaluation.compare.pairing.match import match
from evaluation.compare.pairing.runs import find_runs, read_run
from evaluation.compare.settings import GateSettings
from evaluation.reporting.results import make_result
from evaluation.running.fingerprint import fingerprint
from evaluation.running.saved_answers import read_saved
from glmtune.errors import DataError, GlmtuneError
from glmtune.inference.predict.predictions import Prediction, read_predictions
from recipes.compare import CompareConfig
from recipes.compare import run as compare
from recipes.score import ScoreConfig
from recipes.score import run as score
from tests.evaluation.compare.cases import INT4, write_run
from tests.evaluation.doubles import make_task
from tests.hostile.damaged_files import spoiled_bytes, spoiled_values

FEW = settings(derandomize=True, max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=400)
FILES = ("results.json", "answers.jsonl", "journal-rank0.jsonl", "run.json")
ROWS = [Prediction(row, f"好看{row}", "好看", "问", "eos", 2, scores={"bleu-4": 9.5}) for row in range(4)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    task = make_task(benchmark="ceval")
    return write_run(folder / "bf16", task, wrong=[1]), write_run(folder / "int4", task, INT4, wrong=[2, 4])


@pytest.fixture(scope="module")
def predictions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictions")
    (folder / "generated_predictions.jsonl").write_text(
        "".join(row.to_line() for row in ROWS), encoding="utf-8"
    )
    (folder / "predict_config.json").write_text(json.dumps({"num_rows": 4, "data_fingerprint": "a" * 64}))
    return folder


@contextlib.contextmanager
def replaced(path, content):
    before = path.read_bytes() if path.is_file() else None
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        yield
    finally:
        path.unlink() if before is None else path.write_bytes(before)


def flipped(content: bytes, number: int, seed: int):
    random_places = random.Random(seed)
    for _ in range(number):
        place = random_places.randrange(len(content))
        yield (
            content[:place] + bytes([content[place] ^ 1 << random_places.randrange(8)]) + content[place + 1 :]
        )


class TestFlippedBits:
    def test_no_flip_in_a_run_is_compared_as_something_else(self, runs):
        before, after = (read_run(folder) for folder in runs)
        num_refused = 0
        for name in ("results.json", "answers.jsonl"):
            path = runs[1] / name
            for content in flipped(path.read_bytes(), 200, seed=7):
                with replaced(path, content):
                    try:
                        found = read_run(runs[1])
                    except DataError:
                        num_refused += 1
                        continue
                    # What is left are blanks between values, and the name of the checksum itself.
                    assert found.rows == after.rows
                    assert {key: found.results.get(key) for key in after.results} == dict(after.results)
                    assert len(match(before, found).rows) == 12
        assert num_refused > 300

    def test_no_flip_in_a_journal_changes_how_fast_a_run_was(self, runs):
        path = runs[1] / "journal-rank0.jsonl"
        before = read_run(runs[1]).num_seconds
        for content in flipped(path.read_bytes(), 100, seed=9):
            with replaced(path, content):
                assert read_run(runs[1]).num_seconds in (None, before)

    def test_no_flip_in_predictions_is_scored_as_something_else(self, predictions):
        path = predictions / "generated_predictions.jsonl"
        refused = []
        for content in flipped(path.read_bytes(), 300, seed=8):
            with replaced(path, content):
                try:
                    assert read_predictions(path) == ROWS
                except DataError as error:
                    refused.append(error)
        assert len(refused) > 200
        assert all(error.line is not None for error in refused)

    def test_answers_of_another_run_with_the_same_counts_are_refused(self, runs):
        path = runs[1] / "answers.jsonl"
        with replaced(path, path.read_bytes().replace(b'"prompt_hash": "', b'"prompt_hash":"')):
            with pytest.raises(DataError, match=r"answers.jsonl, line 1: damaged.*glmtune eval"):
                read_run(runs[1])
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        for line in lines:
            del line["checksum"]
        lines[0]["num_new_tokens"] += 1
        with replaced(path, "".join(json.dumps(line) + "\n" for line in lines)):
            with pytest.raises(
                DataError, match=r"its content is not that which results.json .* edited by hand"
            ):
                read_run(runs[1])


def spoil_run(runs, data):
    """Draw a file of the second run and a content for it."""
    path = runs[1] / data.draw(st.sampled_from(FILES))
    content = path.read_bytes()
    if path.suffix == ".json" and data.draw(st.booleans()):
        return path, data.draw(spoiled_values(json.loads(content)))
    if path.suffix == ".jsonl" and data.draw(st.booleans()):
        first, _, rest = content.partition(b"\n")
        return path, data.draw(spoiled_values(json.loads(first))).encode() + b"\n" + rest
    return path, data.draw(spoiled_bytes(content))


def check_compare(runs, data):
    path, content = spoil_run(runs, data)
    unfinished = data.draw(st.booleans()) and path.name in ("journal-rank0.jsonl", "run.json")
    hidden = runs[1] / "results.json"
    with contextlib.ExitStack() as undo:
        undo.enter_context(replaced(path, content))
        if unfinished:
            undo.callback(hidden.write_bytes, hidden.read_bytes())
            hidden.unlink()
        output = runs[0].parent / "out"
        gate = GateSettings(num_resamples=100)
        with contextlib.suppress(GlmtuneError):
            compare(CompareConfig(runs=[str(runs[0]), str(runs[1])], output_dir=str(output), gate=gate))


@FEW
@given(data=st.data())
def test_compare_takes_spoiled_runs_or_refuses_them(runs, data):
    check_compare(runs, data)


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_compare_takes_many_spoiled_runs_or_refuses_them(runs, data):
    check_compare(runs, data)


def check_score(predictions, data):
    name = data.draw(st.sampled_from(["generated_predictions.jsonl", "predict_config.json"]))
    path = predictions / name
    content = path.read_bytes()
    first, _, rest = content.partition(b"\n")
    if data.draw(st.booleans()):
        content = data.draw(spoiled_values(json.loads(first))).encode() + b"\n" * bool(rest) + rest
    else:
        content = data.draw(spoiled_bytes(content))
    with replaced(path, content), contextlib.suppress(GlmtuneError):
        if data.draw(st.booleans()):
            score(ScoreConfig(predictions=str(predictions)))
        else:
            score(ScoreConfig(a=str(predictions), b=str(predictions), num_resamples=100))


@FEW
@given(data=st.data())
def test_score_takes_spoiled_predictions_or_refuses_them(predictions, data):
    check_score(predictions, data)


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_score_takes_many_spoiled_predictions_or_refuses_them(predictions, data):
    check_score(predictions, data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_samples": "12"}, '`num_samples` is "12", but it must be a whole number from 1'),
        ({"accuracy_micro": float("nan")}, "`accuracy_micro` is NaN, but it must be a fraction of 1"),
        ({"accuracy_micro": 75.0}, "`accuracy_micro` is 75.0"),
        ({"is_partial": None}, "`is_partial` is null, but it must be true or false"),
        ({"fingerprint": {}}, "`fingerprint.benchmark` is missing"),
        ({"benchmark": 5}, "`benchmark` is 5, but it must be a text"),
    ],
)
def test_edited_results_are_refused_by_file_and_key(runs, change, words):
    path = runs[0] / "results.json"
    values = json.loads(path.read_text(encoding="utf-8")) | change
    del values["checksum"]
    with replaced(path, json.dumps(values)), pytest.raises(DataError) as caught:
        find_runs(runs[0])
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_benchmark_that_does_not_exist_is_named(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", identity=INT4)]
    with pytest.raises(DataError, match=r"results.json: `benchmark` is `quiz`, which does not exist"):
        compare(CompareConfig(runs=[str(folder) for folder in folders], output_dir=str(tmp_path / "out")))


@pytest.mark.parametrize("name", ["ceval", "mmlu", "gsm8k", "bbh"])
@FEW
@given(data=st.data())
def test_data_of_benchmarks_are_read_or_refused(name, tmp_path_factory, data):
    import shutil

    from glmtune.data.reading.shipped import shipped_folder

    folder = tmp_path_factory.mktemp("data") / name
    shutil.copytree(shipped_folder() / f"{name}_sample", folder)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".csv", ".json", ".jsonl", ".txt")
    )
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    if path.suffix == ".json" and isinstance(json.loads(content), dict) and data.draw(st.booleans()):
        path.write_text(data.draw(spoiled_values(json.loads(content))), encoding="utf-8")
    else:
        path.write_bytes(data.draw(spoiled_bytes(content)))
    with contextlib.suppress(GlmtuneError):
        task = make_benchmark(name, data_dir=folder)
        assert task.data_hash
        assert task.prompt_hash
    shutil.rmtree(folder)


@FEW
@given(data=st.data())
def test_saved_completions_are_read_or_refused(tmp_path_factory, data):
    task = make_task()
    path = tmp_path_factory.mktemp("saved") / "answers.jsonl"
    lines = [
        json.dumps({"subject": each.subject, "index": each.index, "completion": "A"}) for each in task.samples
    ]
    if data.draw(st.booleans()):
        lines[3] = data.draw(
            spoiled_values(json.loads(lines[3]) | {"choice_logprobs": [-1.0, -2.0, -3.0, -4.0]})
        )
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        path.write_bytes(data.draw(spoiled_bytes("\n".join(lines).encode())))
    with contextlib.suppress(GlmtuneError):
        saved = read_saved(path, task, allow_missing=data.draw(st.booleans()))
        assert make_result(saved.task, saved.answers, fingerprint(saved.task, saved.identity, None))
