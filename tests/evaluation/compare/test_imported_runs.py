"""Runs of lm-evaluation-harness and of OpenCompass as sides of a comparison."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evaluation.compare.pairing.contained import find_in_prompts
from evaluation.compare.settings import ImportSettings
from evaluation.compare.several import compare_each, plain_pair, read_sides
from evaluation.sample import Sample
from glmtune.errors import ConfigError, DataError
from tests.evaluation.compare.cases import compared, write_run
from tests.evaluation.doubles import make_samples, make_task

PLAIN = ImportSettings()


# ---- runs of other tools


def harness_line(sample: Sample, *, right: bool, filter: str = "none", **changes: Any) -> dict[str, Any]:
    """A line in the layout of lm-evaluation-harness 0.4."""
    return {
        "doc_id": sample.index,
        "doc": {
            "question": sample.question,
            "subject": sample.subject,
            "choices": list(sample.choices),
            "answer": 0,
        },
        "target": "0",
        "arguments": {"gen_args_0": {"arg_0": f"... {sample.question}", "arg_1": " A"}},
        "resps": [[["-1.5", "False"]]],
        "filtered_resps": [["-1.5", "False"]],
        "filter": filter,
        "metrics": ["acc", "acc_norm"],
        "doc_hash": "0" * 64,
        "prompt_hash": "1" * 64,
        "target_hash": "2" * 64,
        "acc": float(right),
        "acc_norm": float(not right),
        **changes,
    }


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


SIZES = {"law": 3, "art": 5}


def harness(folder: Path, wrong: Sequence[int], **changes: Any) -> Path:
    """Samples of two subjects of one benchmark, as the harness leaves them."""
    samples = make_samples(SIZES)
    for subject in SIZES:
        lines = [
            harness_line(sample, right=place not in wrong, **changes)
            for place, sample in enumerate(samples)
            if sample.subject == subject
        ]
        write_lines(
            folder / "some__model" / f"samples_mmlu_{subject}_2026-11-30T03-10-28.123456.jsonl", lines
        )
    return folder


def test_samples_of_the_harness_against_each_other(tmp_path: Path) -> None:
    names = [str(harness(tmp_path / "a", ())), str(harness(tmp_path / "b", (0, 4, 5)))]
    sides = read_sides(names, PLAIN, None)
    assert plain_pair(sides) is None
    assert list(sides[0]) == ["mmlu"]
    assert {outcome.subject for outcome in sides[0]["mmlu"].outcomes} == {"mmlu_law", "mmlu_art"}
    assert sides[0]["mmlu"].model == "some__model"
    pair = (
        compare_each(sides, names, confidence=0.95, average=None, cluster=None).benchmarks["mmlu"].pairs[0, 1]
    )
    assert (pair.num_first, pair.num_second, pair.num_questions) == (3, 0, 8)
    other = read_sides(names, ImportSettings(metric="acc_norm"), None)
    assert [outcome.is_correct for outcome in other[0]["mmlu"].outcomes] == [False] * 8
    assert other[0]["mmlu"].metric == "acc_norm"


def test_samples_of_the_harness_against_glmtune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same questions in another order, blanks otherwise: paired by their text."""
    from evaluation.compare.pairing import scores

    samples = make_samples(SIZES)
    task = make_task(sizes=SIZES, file="quiz.yaml")
    own = write_run(tmp_path / "own", task, wrong=[0, 7])
    lines = [
        harness_line(sample, right=place != 7, doc_id=place)
        for place, sample in reversed(list(enumerate(samples)))
    ]
    for line in lines:
        line["doc"]["question"] = f"  {line['doc']['question']}\n"
    theirs = write_lines(tmp_path / "samples_quiz.jsonl", lines)
    names = [str(own), str(theirs)]
    with pytest.raises(DataError, match=r"own: .*data of this run are not at hand.*benchmark.data_dir"):
        read_sides(names, PLAIN, None)
    monkeypatch.setattr(scores, "find_questions", lambda run, data_dir: {each.key: each for each in samples})
    pair = compared(names).benchmarks["quiz"].pairs[0, 1]
    assert (pair.num_first, pair.num_second) == (0, 1)
    write_lines(theirs, lines[:-1])
    with pytest.raises(
        DataError, match=r"its 8 questions are not those of .* which has 7: 1 are not there \(first"
    ):
        compared(names)


def test_filters_of_the_harness(tmp_path: Path) -> None:
    sample = make_samples({"law": 1})[0]
    lines = [
        harness_line(sample, right=False, filter="strict-match"),
        harness_line(sample, right=True, filter="flexible-extract"),
    ]
    path = str(write_lines(tmp_path / "samples_gsm8k_2026-11-30T03-10-28.1.jsonl", lines))
    (side,) = read_sides([path], PLAIN, None)
    assert (side["gsm8k"].metric, side["gsm8k"].outcomes[0].is_correct) == ("acc, strict-match", False)
    (side,) = read_sides([path], ImportSettings(filter="flexible-extract"), None)
    assert side["gsm8k"].outcomes[0].is_correct
    with pytest.raises(DataError, match=r"`imported.filter` is `none`, but there are strict-match, flex"):
        read_sides([path], ImportSettings(filter="none"), None)
    with pytest.raises(DataError, match=r"`imported.metric` is `f1`, but there are acc, acc_norm"):
        read_sides([path], ImportSettings(metric="f1"), None)


def test_samples_are_not_held_as_a_whole(tmp_path: Path) -> None:
    """A line is mostly prompt and answer; what is kept of 24 MB of them is a small part."""
    sample = make_samples({"law": 1})[0]
    lines = [
        harness_line(sample, right=True, doc_id=place, filter=name, resps=[["x" * 60_000]])
        for place in range(200)
        for name in ("strict-match", "flexible-extract")
    ]
    path = write_lines(tmp_path / "samples_quiz.jsonl", lines)
    del lines
    tracemalloc.start()
    try:
        (side,) = read_sides([str(path)], PLAIN, None)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(side["quiz"].outcomes) == 200
    assert most < path.stat().st_size / 4


def test_one_benchmark_asked_in_two_ways_is_two(tmp_path: Path) -> None:
    line = harness_line(make_samples({"law": 1})[0], right=True)
    for task in ("bbh_zeroshot_snarks", "bbh_zeroshot_hyperbaton", "bbh_cot_fewshot_snarks"):
        write_lines(tmp_path / f"samples_{task}.jsonl", [line])
    (side,) = read_sides([str(tmp_path)], PLAIN, None)
    assert {name: len(run.outcomes) for name, run in side.items()} == {
        "bbh_zeroshot": 2,
        "bbh_cot_fewshot": 1,
    }
    (tmp_path / "samples_bbh_cot_fewshot_snarks.jsonl").unlink()
    (side,) = read_sides([str(tmp_path)], PLAIN, None)
    assert list(side) == ["bbh"]


def test_a_filter_counts_for_the_tasks_that_have_it(tmp_path: Path) -> None:
    sample = make_samples({"law": 1})[0]
    several = [
        harness_line(sample, right=False, filter="strict-match", metrics=["exact_match"], exact_match=0),
        harness_line(sample, right=True, filter="flexible-extract", metrics=["exact_match"], exact_match=1),
    ]
    write_lines(tmp_path / "samples_gsm8k.jsonl", several)
    write_lines(tmp_path / "samples_quiz.jsonl", [harness_line(sample, right=True)])
    chosen = ImportSettings(filter="flexible-extract", metric="acc_norm")
    (side,) = read_sides([str(tmp_path)], chosen, None)
    assert {name: run.metric for name, run in side.items()} == {
        "gsm8k": "exact_match, flexible-extract",
        "quiz": "acc_norm",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"acc": 1.5}, r"line 1.*`acc` is '1.5', but a score of a question must be a number from 0 to 1"),
        ({"doc_id": -1}, r"line 1.*`doc_id` is -1"),
        ({"doc": {"a": 1}}, r"`doc` has the fields a, none of which is known"),
        ({"metrics": []}, r"`metrics`"),
    ],
    ids=["score", "number", "question", "metrics"],
)
def test_lines_that_are_no_samples(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    line = harness_line(make_samples({"law": 1})[0], right=True) | change
    path = write_lines(tmp_path / "samples_quiz.jsonl", [line])
    with pytest.raises(DataError, match=words):
        read_sides([str(path)], PLAIN, None)


def test_broken_and_double_samples(tmp_path: Path) -> None:
    path = tmp_path / "samples_quiz.jsonl"
    path.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1.*no sample of lm-evaluation-harness.*--log_samples"):
        read_sides([str(path)], PLAIN, None)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no samples"):
        read_sides([str(path)], PLAIN, None)
    line = harness_line(make_samples({"law": 1})[0], right=True)
    write_lines(path, [line, line])
    with pytest.raises(DataError, match=r"line 2.*`doc_id` 0 is there a second time \(first in line 1\)"):
        read_sides([str(path)], PLAIN, None)
    folder = harness(tmp_path / "a", ())
    harness(folder / "x", ())
    for file in (folder / "some__model").glob("*_law_*"):
        file.with_name(file.name.replace("2026-11-30", "2026-12-01")).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="holds the task `mmlu_law` twice"):
        read_sides([str(folder)], PLAIN, None)
    (folder / "other").mkdir()
    write_lines(folder / "other" / "samples_quiz.jsonl", [line])
    with pytest.raises(ConfigError, match=r"holds several models \(other, some__model\)"):
        read_sides([str(folder)], PLAIN, None)


def compass(folder: Path, wrong: Sequence[int], *, model: str = "m", **changes: Any) -> Path:
    """A run of OpenCompass over two data sets of one benchmark, with --dump-eval-details."""
    samples = make_samples(SIZES)
    for subject in SIZES:
        own = [(place, sample) for place, sample in enumerate(samples) if sample.subject == subject]
        prompts = {
            str(sample.index): {
                "origin_prompt": [
                    {"role": "HUMAN", "prompt": "exemplar"},
                    {"role": "BOT", "prompt": "A"},
                    {"role": "HUMAN", "prompt": f"Question: {sample.question}"},
                ],
                "prediction": "B",
                "gold": sample.answer,
            }
            for _, sample in own
        }
        details = {
            str(sample.index): {"predictions": "A", "references": "B", "correct": place not in wrong}
            for place, sample in own
        }
        right = [each["correct"] for each in details.values()]
        values = {
            "accuracy": round(100 * sum(right) / len(right), 2),
            "details": {"type": "GEN", **details},
            **changes,
        }
        for kind, content in (("predictions", prompts), ("results", values)):
            place = folder / kind / model / f"ceval-{subject}.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_runs_of_opencompass(tmp_path: Path) -> None:
    names = [str(compass(tmp_path / "a", ())), str(compass(tmp_path / "b", (1, 2)) / "results" / "m")]
    sides = read_sides(names, PLAIN, None)
    assert list(sides[0]) == ["ceval"]
    assert sides[1]["ceval"].model == "m"
    found = compare_each(sides, names, confidence=0.95, average=None, cluster="subject").benchmarks["ceval"]
    assert (found.pairs[0, 1].num_first, found.pairs[0, 1].num_clusters) == (2, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"details": None}, r"no `details`.*--dump-eval-details"),
        ({"details": {"1": {"correct": True}}}, r"0, 1, 2, ... without a gap"),
        (
            {"details": {"0": {}, "1": {}, "2": {}, "3": {}, "4": {}}},
            r"question 0 of `details` has no `correct`",
        ),
        ({"accuracy": 12.5}, r"give 100.00 %, but it says 12.50 %"),
        ({"accuracy": 10**400}, r"give 100.00 %, but it says 100000000000\.\.\. %"),
        ({"details": {"1" * 5000: {"correct": True}}}, r"0, 1, 2, ... without a gap"),
    ],
    ids=["without", "gaps", "unscored", "another_accuracy", "no_float", "no_number"],
)
def test_results_without_single_questions(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_sides([str(compass(tmp_path, (), **changes))], PLAIN, None)


def test_several_models_of_opencompass(tmp_path: Path) -> None:
    compass(tmp_path, ())
    compass(tmp_path, (), model="n")
    with pytest.raises(ConfigError, match=r"several models \(results/m, results/n\)"):
        read_sides([str(tmp_path)], PLAIN, None)


@pytest.mark.parametrize("turned", [False, True], ids=["questions_first", "prompts_first"])
def test_questions_are_found_in_the_prompts_of_opencompass(tmp_path: Path, turned: bool) -> None:
    names = [str(harness(tmp_path / "a", (0, 4))), str(compass(tmp_path / "b", (4, 5, 7)))]
    if turned:
        names.reverse()
    pair = compared(names).benchmarks["ceval" if turned else "mmlu"].pairs[0, 1]
    assert (pair.num_first, pair.num_second) == ((1, 2) if turned else (2, 1))
    few = [str(harness(tmp_path / "c", ())), str(compass(tmp_path / "d", ()))]
    for file in (tmp_path / "d").glob("*/m/ceval-law.json"):
        file.unlink()
    with pytest.raises(
        DataError, match=r"its 8 questions are not those in the prompts .* are 5: 3 are in none"
    ):
        compared(few)


def test_of_questions_inside_each_other_the_longest_counts() -> None:
    questions = ["Is it so?", "Why? Is it so?", "Is it so?", "她去了哪里？", "x"]
    prompts = ["Question: Why? Is it so? A", "问题：她去了哪里？答案：", "Is it so?", "Q: Is it so? A"]
    assert find_in_prompts(questions, prompts) == [2, 0, 3, 1, None]
    assert find_in_prompts(["", "a"], ["b"]) == [None, None]
