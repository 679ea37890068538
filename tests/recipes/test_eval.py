"""`glmtune eval` from the command line: reports, saved completions, refusals; on the shipped samples."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.benchmarks.tasks import make_task
from evaluation.settings import BenchmarkSettings
from glmtune.cli import main
from glmtune.errors import ConfigError
from glmtune.models.settings import ModelSettings
from recipes.eval import COMMAND, EvalConfig
from recipes.words.compose import load_settings

REPO = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("own_folder")


def results(folder) -> dict:
    return json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))


def saved_gold(path: Path, benchmark: str, **changes) -> list[dict]:
    """Write a file of right answers to a shipped sample."""
    task = make_task(benchmark, data_dir="sample")
    rows = [
        {
            "subject": each.subject,
            "index": each.index,
            "completion": f"So the answer is {each.answer}.",
            "mine": 1,
        }
        for each in task.samples
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return rows


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def test_the_embedded_model_is_evaluated_and_a_second_call_asks_nothing(capsys):
    arguments = ["eval", "benchmark=mmlu", "benchmark.limit=1", "num_threads=1", "protocol=few_shot_direct"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "SAMPLE PARTIAL MMLU test, few_shot_direct" in shown
    assert "Rules, same answers" in shown
    assert "not comparable with published figures" in shown
    (folder,) = Path("runs/eval").iterdir()
    first = (folder / "results.json").read_bytes()
    values = json.loads(first)
    assert values["num_samples"] == len(values["subjects"]) > 1
    assert values["fingerprint"]["model"]["engine"] == "glmtune"
    assert len(values["fingerprint"]["model"]["weights_hash"]) == 16
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert f"Going on: {values['num_samples']} of {values['num_samples']}" in shown
    assert (folder / "results.json").read_bytes() == first
    timing = json.loads((folder / "timing.json").read_text())
    assert timing["num_resumed"] == values["num_samples"]


def test_a_higher_limit_goes_on_in_the_folder_and_asks_only_what_is_new(capsys):
    ask = ["eval", "benchmark=mmlu", "num_threads=1", "protocol=few_shot_direct", "output_dir=out"]
    assert main([*ask, "benchmark.limit=1", "benchmark.subjects=[miscellaneous]"]) == 0
    assert results("out")["num_samples"] == 1
    assert main([*ask, "benchmark.limit=2"]) == 0
    values = results("out")
    shown = capsys.readouterr().out
    assert f"Going on: 1 of {values['num_samples']} questions" in shown
    assert json.loads(Path("out/timing.json").read_text())["num_answered"] == values["num_samples"] - 1
    assert main([*ask[:-1], "output_dir=new", "benchmark.limit=2"]) == 0
    assert results("new")["subjects"] == values["subjects"]
    assert main([*ask, "benchmark.limit=1"]) == 2
    shown = capsys.readouterr().err
    assert "questions that are not asked now" in shown
    assert "completions=out" in shown
    assert main(["eval", "benchmark=mmlu", "protocol=few_shot_direct", "benchmark.limit=1",
                 "completions=out", "output_dir=part"]) == 0  # fmt: skip
    assert results("part")["num_samples"] == len(values["subjects"])


def test_all_runs_the_four_and_prints_the_model_card(capsys):
    assert main(["eval", "benchmark=all", "benchmark.limit=1", "num_threads=1", "output_dir=out"]) == 0
    shown = capsys.readouterr().out
    assert "SAMPLE PARTIAL Model card: glm-tiny" in shown
    for name in ("mmlu", "ceval", "gsm8k", "bbh"):
        assert results(f"out/{name}")["benchmark"] == name
    card = json.loads(Path("out/summary.json").read_text(encoding="utf-8"))
    assert list(card) == ["mmlu", "ceval", "gsm8k", "bbh"]
    assert "| BIG-Bench Hard test | few_shot_cot, 3-shot |" in Path("out/summary.md").read_text(
        encoding="utf-8"
    )


class TestSavedCompletions:
    def test_right_answers_score_full_marks(self, capsys):
        rows = saved_gold(Path("mine.jsonl"), "bbh")
        assert main(["eval", "benchmark=bbh", "completions=mine.jsonl", "output_dir=out"]) == 0
        assert "SAMPLE BIG-Bench Hard test, few_shot_cot, 3-shot: mine.jsonl" in capsys.readouterr().out
        values = results("out")
        assert values["num_samples"] == len(rows)
        assert values["accuracy_macro"] == pytest.approx(1.0)
        assert values["num_unparsed"] == 0
        assert values["fingerprint"]["model"]["engine"] == "saved completions"
        kept = json.loads(Path("out/answers.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert kept["mine"] == 1

    def test_no_torch_is_imported(self):
        saved_gold(Path("mine.jsonl"), "bbh")
        probe = (
            "import sys; from glmtune.cli import main;"
            "code = main(['eval', 'benchmark=bbh', 'completions=mine.jsonl', 'output_dir=out']);"
            "heavy = {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules);"
            "sys.exit(f'imported {heavy}' if heavy else code)"
        )
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_a_missing_line_is_an_error_or_partial(self, capsys):
        rows = saved_gold(Path("mine.jsonl"), "gsm8k")
        write(Path("part.jsonl"), rows[1:])
        assert main(["eval", "benchmark=gsm8k", "completions=part.jsonl"]) == 1
        error = capsys.readouterr().err
        assert f"1 of {len(rows)} questions of gsm8k (test) have no answer (first: `gsm8k` 0)" in error
        assert "allow_missing=true" in error
        arguments = [
            "eval",
            "benchmark=gsm8k",
            "completions=part.jsonl",
            "allow_missing=true",
            "output_dir=out",
        ]
        assert main(arguments) == 0
        assert results("out")["title"].startswith("SAMPLE PARTIAL")
        assert results("out")["num_samples"] == len(rows) - 1

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda rows: [*rows, rows[0]], ["line {end}", "`gsm8k` 0 is answered a second time", "line 1"]),
            (
                lambda rows: [*rows, rows[0] | {"subject": "gsm8"}],
                ["line {end}", "`subject` is `gsm8`", "`gsm8k`"],
            ),
            (lambda rows: [*rows, rows[0] | {"index": 999}], ["line {end}", "`index` is 999", "rows 0 to"]),
            (
                lambda rows: [*rows[:-1], rows[-1] | {"completion": None}],
                ["the field `completion` is missing"],
            ),
            (lambda rows: [*rows[:-1], rows[-1] | {"index": "3"}], ['`index` is "3"', "whole number"]),
        ],
    )
    def test_bad_lines_are_named(self, change, words, capsys):
        rows = change(saved_gold(Path("mine.jsonl"), "gsm8k"))
        write(Path("bad.jsonl"), rows)
        assert main(["eval", "benchmark=gsm8k", "completions=bad.jsonl"]) == 1
        error = capsys.readouterr().err
        assert "bad.jsonl" in error
        assert all(word.format(end=len(rows)) in error for word in words), error

    def test_lines_that_are_no_json_are_named(self, capsys):
        Path("bad.jsonl").write_text('{"subject": "x"\n')
        assert main(["eval", "benchmark=gsm8k", "completions=bad.jsonl"]) == 1
        assert "bad.jsonl, line 1: no valid JSON" in capsys.readouterr().err
        assert main(["eval", "benchmark=gsm8k", "completions=absent.jsonl"]) == 2
        assert "`completions` is `absent.jsonl`, but there is no such file" in capsys.readouterr().err

    def test_scores_alone_text_alone_and_both(self, capsys):
        task = make_task("ceval", data_dir="sample")
        scored = [
            {
                "subject": s.subject,
                "index": s.index,
                "choice_logprobs": [-1.0 - (c != s.answer) for c in "ABCD"],
            }
            for s in task.samples
        ]
        write(Path("scores.jsonl"), scored)
        write(Path("few.jsonl"), [scored[0] | {"choice_logprobs": [-1, -2]}, *scored[1:]])
        write(
            Path("text.jsonl"),
            [{**row, "choice_logprobs": None, "completion": "答案是A。"} for row in scored],
        )
        write(Path("mixed.jsonl"), [*scored[1:], {**scored[0], "choice_logprobs": None, "completion": "A"}])
        assert main(["eval", "benchmark=ceval", "completions=scores.jsonl", "output_dir=a"]) == 0
        assert results("a")["accuracy_micro"] == 1.0
        assert main(["eval", "benchmark=ceval", "completions=text.jsonl", "output_dir=b"]) == 0
        assert set(results("b")["rules"]) < set(task.rules)
        golds = [sample.answer == "A" for sample in task.samples]
        assert results("b")["rules"]["loose"]["accuracy_micro"] == pytest.approx(sum(golds) / len(golds))
        assert main(["eval", "benchmark=ceval", "completions=few.jsonl"]) == 1
        assert (
            "`choice_logprobs` has 2 values, but zero_shot_cot compares 4 choices" in capsys.readouterr().err
        )
        assert main(["eval", "benchmark=ceval", "completions=mixed.jsonl"]) == 1
        assert "no rule of zero_shot_cot" in capsys.readouterr().err

    def test_the_folder_of_a_run_is_scored_as_its_model_was(self):
        assert main(["eval", "benchmark=ceval", "benchmark.limit=2", "num_threads=1", "output_dir=run"]) == 0
        arguments = ["eval", "benchmark=ceval", "benchmark.limit=2", "completions=run", "output_dir=again"]
        assert main(arguments) == 0
        for name in ("accuracy_micro", "rules", "subjects", "num_truncated"):
            assert results("again")[name] == results("run")[name]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["benchmark=cevall"], 2, ["`benchmark` is `cevall`", "Did you mean `ceval`"]),
        (["benchmark=ceval", "protocol=zero_shot"], 2, ["`zero_shot`", "`zero_shot_cot`"]),
        (["benchmark=ceval", "benchmark.data_dir=absent"], 1, ["`benchmark.data_dir` is `absent`"]),
        (["benchmark=ceval", "benchmark.subjects=[lawn]"], 2, ["`benchmark.subjects` is `lawn`"]),
        (["benchmark=ceval", "benchmark.limit=0"], 2, ["`benchmark.limit` is 0", "at least 1"]),
        (["benchmark=ceval", "limit=0"], 2, ["`benchmark.limit` is 0", "at least 1"]),
        (["benchmark=all", "benchmark.split=val"], 2, ["`benchmark.split` is val", "`benchmark=all`"]),
        (["benchmark=all", "completions=x.jsonl"], 2, ["`completions` is `x.jsonl`", "`benchmark` is `all`"]),
        (["benchmark=bbh", "backend=vlm"], 2, ["`backend` is `vlm`", "Did you mean `vllm`"]),
        (["allow_missing=true"], 2, ["`allow_missing` is True", "benchmark.limit"]),
        (["prefix_path=a", "adapter_path=b"], 2, ["are both set"]),
        (["backend=openai", "prefix_path=a"], 2, ["`prefix_path` is `a`, but `backend` is `openai`"]),
        (["backend=openai", "model=chatglm2-6b"], 2, ["`model.source` is `chatglm2-6b`", "`endpoint.model`"]),
        (
            ["backend=openai", "is_chat=true", "endpoint.is_chat=false"],
            2,
            ["`is_chat` is True and `endpoint.is_chat` is False", "Leave one out"],
        ),
        (["completions=a.jsonl", "adapter_path=b"], 2, ["`adapter_path` is `b`, but `completions`"]),
        (["num_threads=0"], 2, ["`num_threads` is 0"]),
        (["benchmark=mmlu", "prefix_path=absent", "num_threads=1"], 1, ["No prefix at"]),
    ],
)
def test_wrong_settings_are_refused(arguments, code, words, capsys):
    assert main(["eval", *arguments]) == code
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error


def test_missing_files_and_wrong_row_counts_end_before_a_model_is_loaded(benchmarks_data, tmp_path, capsys):
    import shutil

    folder = tmp_path / "gsm8k"
    shutil.copytree(benchmarks_data / "gsm8k", folder)
    lines = (folder / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    assert main(["eval", "benchmark=gsm8k", f"benchmark.data_dir={folder}", "model.source=absent"]) == 1
    assert "1318 rows" in capsys.readouterr().err
    (folder / "test.jsonl").unlink()
    assert main(["eval", "benchmark=gsm8k", f"benchmark.data_dir={folder}", "model.source=absent"]) == 1
    assert "glmtune data fetch gsm8k" in capsys.readouterr().err


def test_another_model_in_the_same_folder_is_refused_and_resume_false_begins_anew(capsys, tmp_path):
    common = [
        "eval",
        "benchmark=mmlu",
        "benchmark.limit=1",
        "protocol=few_shot_direct",
        "num_threads=1",
        "output_dir=o",
    ]
    assert main(common) == 0
    assert main([*common, "benchmark.num_fewshot=2"]) == 2
    error = capsys.readouterr().err
    assert "num_fewshot: 5 there, 2 now" in error
    assert "`resume=false`" in error
    assert main([*common, "benchmark.num_fewshot=2", "resume=false"]) == 0
    assert Path("o/earlier-1/results.json").is_file()
    assert results("o")["num_fewshot"] == 2


def test_settings_compose():
    config = load_settings(
        COMMAND, ["benchmark=bbh", "benchmark.subjects=[snarks]", "endpoint.concurrency=2"]
    )
    assert config.benchmark == BenchmarkSettings(name="bbh", subjects=["snarks"])
    assert config.endpoint.concurrency == 2
    assert dataclasses.replace(EvalConfig(), completions="x", model=ModelSettings(source="chatglm2-6b"))
    with pytest.raises(ConfigError, match=r"`wait_seconds` is -1"):
        EvalConfig(wait_seconds=-1)


def test_the_submission_of_cevals_test_split_has_all_its_rows(benchmarks_data, capsys):
    task = make_task("ceval", split="test", data_dir=benchmarks_data, protocol="few_shot_direct")
    rows = [
        {"subject": s.subject, "index": s.index, "choice_logprobs": [-2, -1, -3, -4]} for s in task.samples
    ]
    write(Path("mine.jsonl"), rows)
    arguments = ["eval", "benchmark=ceval", "benchmark.split=test", f"benchmark.data_dir={benchmarks_data}"]
    arguments += ["protocol=few_shot_direct", "completions=mine.jsonl", "output_dir=out", "model=chatglm2-6b"]
    assert main(arguments) == 0
    written = json.loads(Path("out/submission.json").read_text(encoding="utf-8"))
    assert (len(written), sum(map(len, written.values()))) == (52, 12_342)
    example = json.loads((benchmarks_data / "ceval" / "submission_example.json").read_text(encoding="utf-8"))
    assert set(written) == set(example)
    assert set(written["operating_system"].values()) == {"B"}
    assert results("out")["accuracy_macro"] is None
    assert "C-Eval test, few_shot_direct, 5-shot: chatglm2-6b" in capsys.readouterr().out


def test_full_official_data_stand_beside_the_published_row(benchmarks_data, capsys):
    task = make_task("bbh", data_dir=benchmarks_data)
    rows = [
        {
            "subject": s.subject,
            "index": s.index,
            "completion": f"So the answer is {s.answer}." if s.index % 3 else "?",
        }
        for s in task.samples
    ]
    write(Path("mine.jsonl"), rows)
    arguments = ["eval", "benchmark=bbh", f"benchmark.data_dir={benchmarks_data}", "completions=mine.jsonl"]
    assert main([*arguments, "model=chatglm2-6b", "output_dir=out"]) == 0
    values = results("out")
    assert values["num_samples"] == 6511
    assert len(values["subjects"]) == 27
    num_bad = sum(not s.index % 3 for s in task.samples)
    assert values["rules"]["normalized"]["num_unparsed"] == num_bad
    assert values["accuracy_micro"] == pytest.approx(1 - num_bad / 6511)
    assert values["accuracy_macro_23"] != values["accuracy_macro"]
    shown = capsys.readouterr().out
    assert "published" in shown
    assert "30.00" in shown
    assert "SAMPLE" not in shown
    assert f"shown: 2000 of {num_bad}" in Path("out/mistakes.html").read_text(encoding="utf-8")
