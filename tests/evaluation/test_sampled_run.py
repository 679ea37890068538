"""Several answers to each question: drawn by fixed seeds, kept, gone on with, and put together by question."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from evaluation.backend import Drawing, Limits
from evaluation.compare.pairing.runs import find_runs
from evaluation.compare.reporting.matrix import matrix_tables
from evaluation.compare.settings import ImportSettings
from evaluation.compare.several import compare_each, plain_pair, read_sides
from evaluation.compare.statistics.pairwise import STUDENT
from evaluation.evaluate import evaluate_model, evaluate_sampled
from evaluation.running.data_parallel import Processes
from evaluation.running.failed_questions import FAILED_PATTERN
from evaluation.sample import Completion, Failure, Prompt, Sample
from evaluation.task import Rule, Task, hash_prompt
from glmtune.errors import ConfigError, DataError
from glmtune.terminal.console import Console
from tests.evaluation.doubles import Stopped, TableBackend, make_task

DRAWING = Drawing(0.8, seed=3)


class DrawingBackend(TableBackend):
    """Answers by the seed of a prompt: right in about half of the draws."""

    def __init__(self, *, fails: str = "", **options) -> None:
        super().__init__(**options)
        self.seeds: dict[tuple[str, int], int] = {}
        self.fails = fails

    def generate(
        self, prompts: Sequence[Prompt], limits: Limits
    ) -> Iterator[tuple[int, Completion | Failure]]:
        assert limits.drawing is not None
        for place in self._order(prompts):
            prompt, seed = prompts[place], prompts[place].seed
            assert seed is not None
            if self.fails and self.fails in (prompt.text or ""):
                yield place, Failure("out of luck")
                continue
            self.seeds[prompt.text or "", limits.drawing.number] = seed
            yield place, Completion("ABCD"[seed % 4] if seed % 3 else "no idea", "eos", 9, 1)


def run(folder: Path, num_answers: int, backend=None, task=None, **options):
    return evaluate_sampled(
        task or make_task(),
        backend or DrawingBackend(),
        Console(quiet=True),
        num_answers=num_answers,
        drawing=DRAWING,
        output_dir=folder,
        **options,
    )


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def test_answers_that_could_not_be_compared_are_counted_over_all_answers(tmp_path: Path) -> None:
    task = make_task()
    rule = dataclasses.replace(task.rules["official"], matches=lambda extracted, sample: None)
    task = dataclasses.replace(task, prepared=dataclasses.replace(task.prepared, rules={"official": rule}))
    run(tmp_path, 3, task=task)
    values = results(tmp_path)
    assert values["num_undecided"] == 36 - values["num_unparsed_answers"] > 12
    assert values["accuracy_micro"] == 0
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"{values['num_undecided']} of 36 answers could not be compared" in report


def test_seeds_depend_on_question_and_number_alone(tmp_path: Path) -> None:
    backend, reverse = DrawingBackend(), DrawingBackend(reverse=True)
    run(tmp_path / "a", 3, backend)
    run(tmp_path / "b", 3, reverse)
    assert backend.seeds == reverse.seeds
    assert len(set(backend.seeds.values())) == 36, "12 questions, 3 answers, no seed twice"
    assert results(tmp_path / "a")["estimates"] == results(tmp_path / "b")["estimates"]
    assert (tmp_path / "a" / "answers.jsonl").read_bytes() == (tmp_path / "b" / "answers.jsonl").read_bytes()
    assert Drawing(0.8, seed=4).seed_of("law", 0) != DRAWING.seed_of("law", 0)


def test_a_seed_is_no_part_of_what_is_asked() -> None:
    one, two = Prompt(text="x", seed=1), Prompt(text="x", seed=2)
    assert one == two
    assert hash_prompt(one) == hash_prompt(two)


def test_figures_are_those_of_the_lines(tmp_path: Path) -> None:
    done = run(tmp_path, 4)
    values, rows = results(tmp_path), lines(tmp_path)
    assert values["num_answers"] == 4
    assert values["title"] == "Quiz val, test, 4 answers at temperature 0.8: table"
    means = [sum(row["scores"]) / 4 for row in rows]
    assert [row["score"] for row in rows] == means
    assert values["accuracy_micro"] == pytest.approx(sum(means) / 12)
    assert values["estimates"]["mean"]["accuracy_micro"] == pytest.approx(sum(means) / 12)
    assert values["estimates"]["pass@4"]["accuracy_micro"] == pytest.approx(
        sum(any(row["scores"]) for row in rows) / 12
    )
    assert list(values["estimates"]) == ["mean", "majority", "pass@2", "pass@4"]
    assert values["num_unparsed_answers"] == sum(row["answers"].count(None) for row in rows)
    assert values["sampling"] == {"temperature": 0.8, "top_p": 1.0, "top_k": 0, "seed": 3}
    decoding = values["fingerprint"]["decoding"]
    assert (decoding["do_sample"], decoding["num_answers"], "number" in decoding) == (True, 4, False)
    single = [results(tmp_path / f"answer-{number}")["accuracy_micro"] for number in range(1, 5)]
    assert values["accuracy_micro"] == pytest.approx(sum(single) / 4)
    assert done is not None
    assert not done.result.is_comparable
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| mean over answers (pass@1) | 12 | 4 |" in text
    assert "| majority vote | 12 | 4 |" in text
    assert "the question is the unit" in text
    assert "| subject | 12 | 2 |" in text, "errors clustered by subject"


def test_it_goes_on_after_a_kill_and_with_more_answers(tmp_path: Path) -> None:
    whole = DrawingBackend()
    run(tmp_path / "whole", 3, whole)
    with pytest.raises(Stopped):
        run(tmp_path / "run", 3, DrawingBackend(fail_after=17))
    rest = DrawingBackend()
    run(tmp_path / "run", 3, rest)
    assert len(rest.asked) == 36 - 17
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    more = DrawingBackend()
    run(tmp_path / "run", 5, more)
    assert len(more.asked) == 24, "only the two further answers are drawn"
    assert results(tmp_path / "run")["num_answers"] == 5
    other = DrawingBackend()
    with pytest.raises(ConfigError, match="temperature"):
        evaluate_sampled(
            make_task(),
            other,
            Console(quiet=True),
            num_answers=1,
            drawing=Drawing(0.5),
            output_dir=tmp_path / "run",
        )
    assert other.asked == []


def test_one_answer_and_several_do_not_share_a_folder(tmp_path: Path) -> None:
    run(tmp_path / "several", 2)
    with pytest.raises(ConfigError, match=r"holds a run of several answers to each question \(answer-1\)"):
        evaluate_model(make_task(), TableBackend(), Console(quiet=True), output_dir=tmp_path / "several")
    evaluate_model(make_task(), TableBackend(), Console(quiet=True), output_dir=tmp_path / "one")
    with pytest.raises(ConfigError, match=r"holds a run of one answer to each question \(run.json\)"):
        run(tmp_path / "one", 2)


def test_a_default_folder_is_the_same_for_any_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = []
    for num_answers in (1, 3):
        done = evaluate_sampled(
            make_task(), DrawingBackend(), Console(quiet=True), num_answers=num_answers, drawing=DRAWING
        )
        assert done is not None
        folders.append(done.folder)
    assert folders[0] == folders[1]
    assert "1 answer at temperature 0.8" in done.result.title or "3 answers" in done.result.title


def test_what_failed_once_is_left_out_and_named(tmp_path: Path) -> None:
    run(tmp_path, 2, DrawingBackend(fails="law question 1?"))
    values = results(tmp_path)
    assert values["title"].startswith("PARTIAL ")
    assert (values["num_samples"], values["num_failed"]) == (11, 1)
    assert values["failed"][0]["subject"] == "law"
    assert list((tmp_path / "answer-1").glob(FAILED_PATTERN))


def test_nothing_is_drawn_where_nothing_is_written_or_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compares probabilities and generates nothing"):
        run(tmp_path, 2, task=make_task("choices"))
    with pytest.raises(ConfigError, match=r"no gold answers"):
        run(tmp_path, 2, task=make_task(labelled=False))
    (tmp_path / "novel.txt").write_text("once", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no evaluation of glmtune \(novel.txt\)"):
        run(tmp_path, 2)


def test_two_stages_are_drawn_and_then_scored(tmp_path: Path) -> None:
    class Both(DrawingBackend):
        def score_choices(self, prompts, choices):
            from evaluation.sample import ChoiceScores

            for place in self._order(prompts):
                text = prompts[place].turns[-1].content
                best = "ABCD".find(text.rpartition("?")[2][:1])
                yield place, ChoiceScores(tuple(-0.1 if n == best else -3.0 - n for n in range(4)), 5)

    run(tmp_path, 3, Both(), make_task("generate_then_choices"))
    assert results(tmp_path)["rule"] == "choice"
    assert 0 < results(tmp_path)["accuracy_micro"] < 1


def test_a_comparison_reads_it_as_scores(tmp_path: Path) -> None:
    run(tmp_path, 4)
    (found,) = find_runs(tmp_path).values()
    assert found.is_sampled
    assert [row.outcome.value for row in found.rows] == [row["score"] for row in lines(tmp_path)]
    path = tmp_path / "answers.jsonl"
    rows = [{**row, "score": 0.5} for row in lines(tmp_path)]
    for row in rows:
        del row["checksum"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"its scores add up to"):
        find_runs(tmp_path)


def test_processes_share_every_answer(tmp_path: Path) -> None:
    import threading

    found: dict[int, object] = {}

    def work(rank: int) -> None:
        found[rank] = run(tmp_path, 2, processes=Processes(rank, 2, 20))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found[1] is None
    assert results(tmp_path)["num_samples"] == 12
    run(tmp_path / "alone", 2)
    assert lines(tmp_path) == lines(tmp_path / "alone")


def test_paper_files(tmp_path: Path) -> None:
    run(tmp_path, 2, paper=True)
    for name in ("chart.png", "chart.svg", "chart.pdf", "tables.tex"):
        assert (tmp_path / name).stat().st_size > 300, name
    first = (tmp_path / "chart.pdf").read_bytes(), (tmp_path / "chart.svg").read_bytes()
    run(tmp_path, 2, paper=True)
    assert ((tmp_path / "chart.pdf").read_bytes(), (tmp_path / "chart.svg").read_bytes()) == first
    assert r"\toprule" in (tmp_path / "tables.tex").read_text(encoding="utf-8")


def graded_task() -> Task:
    """A is worth 1, B 3/4, C 1/2, D nothing, whatever the question."""

    def grade(text: str, sample: Sample) -> float:
        return {"A": 1.0, "B": 0.75, "C": 0.5}.get(text, 0.0)

    rule = Rule("a letter has a grade", lambda text, _: text if len(text) == 1 else None, grade=grade)
    task = make_task(file="quiz.yaml")
    return dataclasses.replace(task, prepared=dataclasses.replace(task.prepared, rules={"worth": rule}))


def test_several_graded_answers(tmp_path: Path) -> None:
    done = run(tmp_path / "a", 2, task=graded_task())
    assert done is not None
    values, rows = results(tmp_path / "a"), lines(tmp_path / "a")
    worth = {"A": 1.0, "B": 0.75, "C": 0.5, "D": 0.0, None: 0.0}
    assert [row["scores"] for row in rows] == [[worth[each] for each in row["answers"]] for row in rows]
    assert [row["score"] for row in rows] == [sum(row["scores"]) / 2 for row in rows]
    assert {row["status"] for row in rows} == {"graded", "unparsed"}
    estimates = {name: each["accuracy_micro"] for name, each in values["estimates"].items()}
    full = [row["scores"].count(1.0) for row in rows]
    assert list(estimates) == ["mean", "majority", "pass@1", "pass@2"]
    assert estimates["mean"] == values["accuracy_micro"] == pytest.approx(sum(r["score"] for r in rows) / 12)
    assert estimates["pass@1"] == pytest.approx(sum(full) / 24)
    assert estimates["pass@2"] == pytest.approx(sum(map(bool, full)) / 12)
    assert estimates["pass@1"] < estimates["mean"], "only full marks pass"
    assert values["is_graded"] is True
    assert not done.result.is_comparable
    text = (tmp_path / "a" / "report.md").read_text(encoding="utf-8")
    assert "| mean over answers | 12 | 2 |" in text
    assert "an answer passes with full marks only" in text
    assert text.count("mean grade, %") == 3, "of estimates, clusters, subjects"
    assert "accuracy, %" not in text


def test_several_graded_answers_beside_one_graded_answer(tmp_path: Path) -> None:
    task = graded_task()
    run(tmp_path / "drawn", 2, task=task)

    class Letters(TableBackend):
        def generate(self, prompts: Sequence[Prompt], limits: Limits) -> Iterator[tuple[int, Completion]]:
            for place in self._order(prompts):
                yield place, Completion("AB"[place % 2], "eos", 9, 1)

    evaluate_model(task, Letters(), Console(quiet=True), output_dir=tmp_path / "one")
    names = [str(tmp_path / "drawn"), str(tmp_path / "one")]
    sides = read_sides(names, ImportSettings(), None)
    assert plain_pair(sides) is None, "no verdict"
    matrix = compare_each(sides, names, confidence=0.95, average=None, cluster=None)
    found = matrix.benchmarks["quiz"]
    pair = found.pairs[0, 1]
    assert pair.method == STUDENT, "McNemar's test counts right and wrong"
    assert (pair.num_first, pair.num_second) == (None, None)
    first, second = (results(Path(name))["accuracy_micro"] for name in names)
    assert pair.difference_pp == pytest.approx(100 * (first - second))
    assert found.metrics == ("mean grade, mean of 2 answers", "mean grade")
    assert "accuracy, %" not in "".join(table.to_markdown() for table in matrix_tables(matrix))


def test_a_question_is_truncated_whose_every_answer_is(tmp_path: Path) -> None:
    class Long(DrawingBackend):
        def generate(self, prompts: Sequence[Prompt], limits: Limits) -> Iterator[tuple[int, Completion]]:
            assert limits.drawing is not None
            for place in self._order(prompts):
                is_cut = place == 0 or (place == 1 and limits.drawing.number == 0)
                yield place, Completion("A", "length" if is_cut else "eos", 9, 1)

    run(tmp_path, 2, Long())
    values = results(tmp_path)
    assert (values["num_truncated"], values["num_truncated_answers"]) == (1, 3)
    assert [values["subjects"][name]["num_truncated"] for name in ("law", "art")] == [1, 0]
    assert [row["answers"] for row in lines(tmp_path)] == [["A", "A"]] * 12
