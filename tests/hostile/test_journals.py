"""Journals and folders of runs: damage costs a line and is said, strange characters pass, nothing else is touched."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evaluation.answer import Answer, parse_answer
from evaluation.compare.pairing.runs import read_run
from evaluation.reporting.files import write_report
from evaluation.reporting.results import make_result
from evaluation.running.fingerprint import fingerprint
from evaluation.running.run_folder import journal_path, lock_run, open_run
from evaluation.running.runner import run_task
from evaluation.running.saved_answers import read_saved
from evaluation.sample import Completion, Prompt, Sample
from evaluation.task import hash_prompt
from glmtune.errors import ConfigError, GlmtuneError
from glmtune.inference.predict.predictions import Prediction, parse_prediction, read_predictions
from glmtune.inference.predict.questions import cut_reference
from glmtune.inference.predict.run_identity import RunIdentity, answered_rows, open_journal
from glmtune.metrics.text import score_row
from glmtune.storage.journal import Journal, read_journal
from tests.evaluation.compare.cases import write_run
from tests.evaluation.doubles import IDENTITY, TableBackend, make_task
from tests.hostile.damaged_files import spoiled_bytes

STRANGE = "one\u2028two\u2029three\u0085four\x1cfive\x1d\x1e\x0b\x0c\r\n\x00 \ud83d half \udc00 好"
ANSWER = Answer(
    "law", 3, prompt_hash="ab", completion="答案是 B", choice_logprobs=(-1.5, -0.25), stop_reason="eos"
)
ANSWERS = [dataclasses.replace(ANSWER, index=index, completion=f"答案是 {index}") for index in range(3)]
RUN = {"data_hash": "d1", "model": {"dtype": "float32"}, "num_samples": 3}
ROWS = [
    Prediction(
        row, f"好{row}", "好", prompt="问", stop_reason="eos", num_new_tokens=2, scores={"bleu-4": 9.5}
    )
    for row in range(3)
]
PREDICT = RunIdentity("m", "f", "t", "float32", "d", "test", "df", 3, 64, 64, "", {"num_beams": 1}, "1")


def flips(content: bytes):
    for place in range(len(content)):
        yield content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


@pytest.mark.parametrize(("entries", "parse"), [(ANSWERS, parse_answer), (ROWS, parse_prediction)])
def test_no_flipped_bit_of_a_journal_gives_another_answer(tmp_path, entries, parse):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        for entry in entries:
            journal.append(entry)
    for content in flips(path.read_bytes()):
        path.write_bytes(content)
        found = read_journal(path, parse)
        # A flip in the name of the checksum leaves one more field that means nothing.
        known = [
            dataclasses.replace(each, extra={}) if isinstance(each, Answer) else each
            for each in found.entries
        ]
        assert all(each in entries for each in known)
        assert len(known) == len(entries) or found.notes(path)
        assert len(known) >= len(entries) - 2  # two lines where the line end between them is gone


@settings(
    derandomize=True,
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_whatever_lies_in_a_journal_a_run_goes_on_or_says_why(tmp_path, data):
    content = "".join(answer.to_line() for answer in ANSWERS).encode()
    (tmp_path / "run.json").write_text(json.dumps(RUN), encoding="utf-8")
    journal_path(tmp_path, 0).write_bytes(data.draw(spoiled_bytes(content)))
    with lock_run(tmp_path) as journal:
        opened = open_run(journal, RUN)
        assert all(answer in ANSWERS for answer in opened.answers.values())
        assert len(opened.answers) == 3 or opened.notes or not journal.path.stat().st_size
        journal.append(ANSWER)
    with lock_run(tmp_path) as journal:
        again = open_run(journal, RUN)
    assert again.notes == ()
    assert set(again.answers) == {*opened.answers, ANSWER.key}


@settings(
    derandomize=True,
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_whatever_lies_in_the_identity_of_a_run_is_refused_in_words(tmp_path, data):
    journal_path(tmp_path, 0).write_text(ANSWER.to_line(), encoding="utf-8")
    (tmp_path / "run.json").write_bytes(data.draw(spoiled_bytes(json.dumps(RUN).encode())))
    said = "run.json: another run"
    try:
        with lock_run(tmp_path) as journal:
            assert list(open_run(journal, RUN).answers) == [ANSWER.key]
    except GlmtuneError as error:
        said = str(error)
    assert "run.json" in said or "another run" in said


def test_lines_of_before_there_were_checksums_are_taken(tmp_path):
    path = journal_path(tmp_path, 0)
    path.write_text("".join(json.dumps(answer.to_values()) + "\n" for answer in ANSWERS), encoding="utf-8")
    assert read_journal(path, parse_answer).entries == ANSWERS


def test_a_damaged_row_is_predicted_again_and_said(tmp_path, caplog):
    folder = tmp_path / "predict"
    with open_journal(folder) as journal:
        assert answered_rows(journal, PREDICT) == []
        for row in ROWS:
            journal.append(row)
    path = folder / "generated_predictions.jsonl"
    path.write_bytes(path.read_bytes().replace("好1".encode(), "好7".encode()))
    with open_journal(folder) as journal, caplog.at_level(logging.WARNING):
        assert answered_rows(journal, PREDICT) == [ROWS[0], ROWS[2]]
    assert "1 lines cannot be read (line 2: damaged" in caplog.text
    assert "好7" in (folder / "generated_predictions.jsonl.damaged").read_text(encoding="utf-8")


class TestStrangeCharacters:
    def test_answers_come_back_as_they_were(self, tmp_path):
        answer = dataclasses.replace(
            ANSWER, subject="la\u2028w\ud800", completion=STRANGE, extra={"note\x85": STRANGE}
        )
        with Journal(tmp_path / "j.jsonl") as journal:
            journal.append(answer)
            journal.append(ANSWER)
        assert read_journal(tmp_path / "j.jsonl", parse_answer).entries == [answer, ANSWER]

    def test_predictions_come_back_as_they_were(self, tmp_path):
        rows = [
            dataclasses.replace(row, prediction=STRANGE, reference=STRANGE, prompt=STRANGE) for row in ROWS
        ]
        with Journal(tmp_path / "p.jsonl") as journal:
            journal.append(ROWS[0])
            journal.rewrite(rows)
        assert read_predictions(tmp_path / "p.jsonl") == rows

    def test_a_run_is_answered_reported_and_compared(self, tmp_path):
        class Talker(TableBackend):
            def generate(self, prompts, limits):
                for place, completion in super().generate(prompts, limits):
                    yield place, Completion(f"{STRANGE} {completion.text}", "eos", 3, 4)

        task = make_task()
        first = dataclasses.replace(task.samples[0], question=f"{task.samples[0].question}{STRANGE}")
        task = dataclasses.replace(task, samples=(first, *task.samples[1:]))
        finished = run_task(task, Talker(), tmp_path / "run")
        assert STRANGE in finished.answers[1].completion
        write_report(make_result(task, finished.answers, fingerprint(task, IDENTITY, 2048)), tmp_path / "run")
        found = [row.answer.completion for row in read_run(tmp_path / "run").rows]
        assert found == [answer.completion for answer in finished.answers]
        assert [answer.completion for answer in read_saved(tmp_path / "run", task).answers] == found

    def test_texts_are_hashed_cut_and_scored(self, tiny_tokenizer_folder):
        from glmtune.loading import load_tokenizer

        assert len(hash_prompt(Prompt(text=STRANGE))) == 16
        assert cut_reference(load_tokenizer(str(tiny_tokenizer_folder)), "好\ud83d 看\udc00", 64)
        assert score_row(STRANGE, STRANGE).named()["exact-match"] == 100.0
        assert Sample("quiz", "law", 0, STRANGE).question == STRANGE


class TestFoldersOfOthers:
    @pytest.fixture
    def theirs(self, tmp_path):
        folder = tmp_path / "thesis"
        folder.mkdir()
        for name in (
            "results.json",
            "run.json",
            "generated_predictions.jsonl",
            "compare.json",
            "chapter.tex",
        ):
            (folder / name).write_text('{"prompt": "theirs", "model": "x"}\n', encoding="utf-8")
        return folder

    def unchanged(self, folder):
        return {
            path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.name[0] != "."
        }

    @pytest.mark.parametrize("resume", [True, False])
    def test_eval_refuses_them(self, theirs, resume):
        before = self.unchanged(theirs)
        with pytest.raises(
            ConfigError, match=r"thesis`, but it holds files that are no evaluation of glmtune \(chapter"
        ):
            run_task(make_task(), TableBackend(), theirs, resume=resume)
        assert self.unchanged(theirs) == before

    def test_scoring_saved_completions_refuses_them(self, theirs, tmp_path):
        finished = run_task(make_task(), TableBackend(), tmp_path / "run")
        before = self.unchanged(theirs)
        with pytest.raises(ConfigError, match="no evaluation of glmtune"):
            write_report(
                make_result(make_task(), finished.answers, fingerprint(make_task(), IDENTITY, 9)), theirs
            )
        assert self.unchanged(theirs) == before

    @pytest.mark.parametrize("resume", ["auto", "never"])
    def test_predict_refuses_them(self, theirs, resume):
        before = self.unchanged(theirs)
        with pytest.raises(ConfigError, match="no predictions of glmtune"):
            with open_journal(theirs) as journal:
                answered_rows(journal, PREDICT, resume=resume)
        assert self.unchanged(theirs) == before

    def test_compare_refuses_them_before_a_model_is_asked(self, theirs, tmp_path):
        from recipes.compare import CompareConfig, run

        before = self.unchanged(theirs)
        with pytest.raises(ConfigError, match="no comparison of glmtune"):
            run(CompareConfig(runs=[str(tmp_path / "a"), str(tmp_path / "b")], output_dir=str(theirs)))
        assert self.unchanged(theirs) == before

    def test_what_lies_beside_a_run_stays_where_it_is(self, tmp_path):
        write_run(tmp_path / "run")
        (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
        run_task(make_task(), TableBackend(), tmp_path / "run", resume=False)
        assert (tmp_path / "run" / "notes.txt").read_text(encoding="utf-8") == "mine"
        moved = {path.name for path in (tmp_path / "run" / "earlier-1").iterdir()}
        assert {"results.json", "answers.jsonl", "journal-rank0.jsonl"} <= moved

    def test_a_start_that_was_killed_while_it_moved_is_known_as_ours(self, tmp_path):
        (tmp_path / "run" / "earlier-1").mkdir(parents=True)
        assert run_task(make_task(), TableBackend(), tmp_path / "run")
