"""`glmtune compare` from the command line: verdicts by exit code, reused answers, tables of methods, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.benchmarks.tasks import make_task
from glmtune.cli import main
from glmtune.errors import ConfigError
from recipes.compare import COMMAND, CompareConfig
from recipes.words.compose import load_settings

SMALL = (
    "benchmark.data_dir=sample",
    "benchmark.limit=2",
    "protocol=few_shot_direct",
    "num_threads=1",
    "gate.num_resamples=200",
)


pytestmark = pytest.mark.usefixtures("own_folder")


def command(*words: str) -> int:
    return main(["compare", *words])


def figures(folder: str | Path = "out") -> dict:
    return json.loads((Path(folder) / "compare.json").read_text(encoding="utf-8"))


def saved_run(name: str, benchmark: str = "gsm8k", *, num_wrong: int = 0) -> str:
    """Evaluate made-up completions of a shipped sample: no model is needed."""
    task = make_task(benchmark, data_dir="sample")
    rows = [
        {
            "subject": each.subject,
            "index": each.index,
            "completion": f"So the answer is {each.answer if place >= num_wrong else '-77'}.",
        }
        for place, each in enumerate(task.samples)
    ]
    path = Path(f"{name}.jsonl")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    words = (
        f"benchmark={benchmark}",
        "benchmark.data_dir=sample",
        f"completions={path}",
        f"output_dir={name}",
    )
    assert main(["eval", *words]) == 0
    return name


class TestTwoModels:
    def test_both_are_evaluated_compared_and_nothing_is_asked_twice(self, capsys):
        Path("text.txt").write_text("小明有3个苹果，又买了5个，一共有8个。\n" * 8, encoding="utf-8")
        words = (
            "benchmark=mmlu,ceval", "baseline.quantization=bf16", "candidate.quantization=int4", *SMALL,
            "text_file=text.txt", "text_window_tokens=40", "output_dir=out",
        )  # fmt: skip
        assert command(*words) == 4
        shown = capsys.readouterr().out
        assert "model  glm-tiny (bfloat16)" in shown
        assert "model  glm-tiny, quantized to int4 (bfloat16)" in shown
        assert "SAMPLE PARTIAL BF16 → INT4: glm-tiny" in shown
        assert "not enough questions to tell: the drop is" in shown
        values = figures()
        assert list(values["benchmarks"]) == ["mmlu", "ceval"]
        assert values["labels"] == ["BF16", "INT4"]
        runs = values["benchmarks"]["mmlu"]["runs"]
        assert runs["baseline"]["fingerprint"]["model"]["dtype"] == "bfloat16"
        assert runs["candidate"]["fingerprint"]["model"]["dtype"] == "bfloat16"
        assert runs["candidate"]["fingerprint"]["model"]["quantization"] == "int4"
        assert values["benchmarks"]["mmlu"]["sensitivity"]["choices"]["js_nats"]["mean"] > 0
        assert values["perplexity"]["num_tokens"] > 100
        assert values["perplexity"]["baseline"] != values["perplexity"]["candidate"]
        for name in ("compare.md", "flips.html", "drops.png", "flips_by_margin.png"):
            assert (Path("out") / name).stat().st_size > 500
        assert "questions are not shown" not in Path("out/flips.html").read_text(encoding="utf-8")
        first = Path("out/compare.json").read_bytes()
        assert command(*words) == 4
        again = capsys.readouterr().out
        assert again.count("Going on: ") == 4
        assert Path("out/compare.json").read_bytes() == first
        # runs that `glmtune eval` would make are the same ones
        folders = [each["folder"] for each in runs.values()]
        assert command(f"runs=[{','.join(folders)}]", "output_dir=from_runs") == 4
        same = figures("from_runs")["benchmarks"]["mmlu"]
        assert same["micro"]["baseline"] == values["benchmarks"]["mmlu"]["micro"]["baseline"]
        assert same["sensitivity"] == values["benchmarks"]["mmlu"]["sensitivity"]

    def test_a_crashed_candidate_is_completed(self, capsys):
        words = ("benchmark=mmlu", "candidate.quantization=int4", *SMALL, "output_dir=out")
        command(*words)
        whole = figures()["benchmarks"]["mmlu"]
        runs = figures()["benchmarks"]["mmlu"]["runs"]
        candidate = Path(runs["candidate"]["folder"])
        for name in ("results.json", "answers.jsonl"):
            (candidate / name).unlink()
        journal = candidate / "journal-rank0.jsonl"
        content = journal.read_bytes()
        journal.write_bytes(content[: len(content) // 2])
        capsys.readouterr()
        assert command(f"runs=[{runs['baseline']['folder']},{candidate}]") == 1
        assert "this run is not finished: " in capsys.readouterr().err
        command(*words)
        assert "is dropped and its question asked again" in capsys.readouterr().out
        again = figures()["benchmarks"]["mmlu"]  # other batches, so probabilities differ in the last digits
        assert again["verdict"] == whole["verdict"]
        assert again["subjects"] == whole["subjects"]
        shift, expected = (each["sensitivity"]["choices"]["js_nats"] for each in (again, whole))
        assert shift["mean"] == pytest.approx(expected["mean"], rel=1e-3)

    def test_one_model_at_a_time_is_in_memory(self, monkeypatch):
        import weakref

        from evaluation.backends import glm

        loaded: list[weakref.ref] = []
        load = glm.load_backend

        def load_alone(*arguments, **settings):
            assert all(each() is None for each in loaded)
            backend = load(*arguments, **settings)
            loaded.append(weakref.ref(backend._model))
            return backend

        monkeypatch.setattr(glm, "load_backend", load_alone)
        command("benchmark=mmlu", "candidates=[int8,int4]", *SMALL)
        assert len(loaded) == 3

    def test_tuning_is_compared_with_retention(self, tmp_path, capsys):
        from glmtune.loading import load_model
        from glmtune.prefix.checkpoint import save_prefix
        from glmtune.prefix.encoder import PrefixEncoder, prefix_shape

        encoder = PrefixEncoder(prefix_shape(load_model("glm-tiny").config), pre_seq_len=4)
        save_prefix(encoder, tmp_path / "tuned")
        command("benchmark=mmlu", "candidate.prefix_path=tuned", *SMALL, "output_dir=out")
        shown = capsys.readouterr().out
        assert "base → prefix " in shown
        assert "retention, %" in shown
        values = figures()
        assert values["labels"][0] == "base"
        micro = values["benchmarks"]["mmlu"]["micro"]
        if micro["baseline"]["accuracy"]:
            assert micro["retention"] == pytest.approx(
                micro["candidate"]["accuracy"] / micro["baseline"]["accuracy"]
            )

    def test_candidates_are_ranked_and_the_baseline_is_asked_once(self, capsys):
        words = ("benchmark=mmlu", "candidates=[int8,int4]", *SMALL, "output_dir=out")
        assert command(*words) == 4
        shown = capsys.readouterr().out
        assert shown.count("model  glm-tiny\n") == 1
        assert "(baseline)" in shown
        values = json.loads(Path("out/methods.json").read_text(encoding="utf-8"))
        assert set(values["methods"]) == {"int8", "int4"}
        sizes = {name: each["weight_bytes"] for name, each in values["methods"].items()}
        assert sizes["int4"] < sizes["int8"] < values["baseline"]["weight_bytes"]
        assert values["methods"]["int4"]["questions_per_second"] > 0
        assert Path("out/pareto.png").read_bytes().startswith(b"\x89PNG")
        assert figures("out/int8")["labels"][1] == "INT8"
        assert figures("out/int4")["labels"][1] == "INT4"


class TestGate:
    def test_within_is_0_exceeds_is_3_undecided_is_4(self, capsys):
        same, other, worse = saved_run("same"), saved_run("other"), saved_run("worse", num_wrong=60)
        num = len(make_task("gsm8k", data_dir="sample").samples)
        assert command(f"runs=[{same},{other}]", "gate.max_drop_pp=20") == 0
        assert "within tolerance: the drop is +0.00 points" in capsys.readouterr().out
        assert command(f"runs=[{same},{other}]", "gate.max_drop_pp=0.1") == 4
        assert "not enough questions to tell" in capsys.readouterr().out
        assert command(f"runs=[{same},{worse}]", "output_dir=out") == 3
        assert (
            f"exceeds tolerance: the drop is +{100 * min(60, num) / num:.2f} points"
            in capsys.readouterr().out
        )
        assert figures()["exit_code"] == 3
        assert command(f"runs=[{worse},{same}]", "gate.max_drop_pp=0.5") == 0

    def test_no_torch_is_imported_for_finished_runs(self):
        same, other = saved_run("same"), saved_run("other", num_wrong=2)
        probe = (
            "import sys; from glmtune.cli import main;"
            f"code = main(['compare', 'runs=[{same},{other}]']);"
            "heavy = {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules);"
            "sys.exit(f'imported {heavy}' if heavy else code)"
        )
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
        assert done.returncode == 4, done.stderr

    def test_the_folder_is_the_same_for_the_same_runs(self):
        runs = f"runs=[{saved_run('same')},{saved_run('other', num_wrong=3)}]"
        command(runs)
        command(runs)
        assert len(list(Path("runs/compare").iterdir())) == 1


class TestRefusals:
    def test_runs_of_different_benchmarks(self, capsys):
        assert command(f"runs=[{saved_run('a')},{saved_run('b', 'bbh')}]") == 1
        assert "bbh, gsm8k was run on one side only" in capsys.readouterr().err

    def test_a_shorter_run(self, capsys):
        saved_run("a")
        lines = Path("a.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        Path("short.jsonl").write_text("".join(lines[:-3]), encoding="utf-8")
        words = ("benchmark=gsm8k", "benchmark.data_dir=sample", "completions=short.jsonl")
        assert main(["eval", *words, "allow_missing=true", "output_dir=short"]) == 0
        assert command("runs=[a,short]") == 1
        error = capsys.readouterr().err
        assert f"differ in data (num_samples: {len(lines)} and {len(lines) - 3}; data_hash: " in error

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ((), "Baseline and candidate are the same model. Say what differs"),
            (
                ("candidate.quantization=int5",),
                "`quantization` is `int5`, which does not exist. Did you mean `int",
            ),
            (("candidates=[int4,int99]",), "`quantization` is `int99`"),
            (("candidates=[]",), "`candidates` is empty"),
            (
                ("candidates=[int4]", "candidate.quantization=int8"),
                "`candidate.quantization` is `int8` beside",
            ),
            (("candidate.prefix_path=nowhere",), "`prefix_path` is `nowhere`, but there is no such"),
            (("candidate.quantization=int4", "text_file=no.txt"), "`text_file` is `no.txt`"),
            (("candidate.quantization=int4", "benchmark=cevall"), "`benchmark` is `cevall`"),
            (("candidate.quantization=int4", "benchmark=ceval,mmluu"), "`benchmark` is `mmluu`"),
            (
                ("candidate.quantization=int4", "benchmark=ceval,mmlu", "benchmark.split=val"),
                "`benchmark.split` is val, but ceval, mmlu differ in it",
            ),
            (("candidate.quantization=int4", "benchmark.split=test"), "no gold answers|split|test"),
            (("runs=[a]",), "`runs` names 1 folder, but it must name two"),
            (("runs=[a,b,c]",), "`runs` names `a`, but this folder does not exist"),
            (("runs=[a,b]", "candidate.quantization=int4"), "`candidate` is set beside `runs`"),
            (("runs=[a,b]", "model=chatglm2-6b"), "`model` is set beside `runs`"),
            (("runs=[a,b]", "text_file=x"), "`text_file` is set beside `runs`"),
            (("runs=[a,b]", "benchmark=mmlu"), "`benchmark` is set beside `runs`"),
            (("runs=[a,b]", "resume=false"), "`resume` is set beside `runs`"),
            (("runs=[a,b]",), "`runs` names `a`, but this folder does not exist"),
            (("candidate.quantization=int4", "gate.max_drop=2"), "Did you mean `gate.max_drop_pp`"),
            (("candidate.quantization=int4", "text_window_tokens=0"), "`text_window_tokens` is 0"),
        ],
    )
    def test_wrong_settings(self, words, message, capsys):
        import re

        assert command(*words) in (1, 2)
        captured = capsys.readouterr()
        assert re.search(message, captured.err), captured.err
        assert "Traceback" not in captured.err
        assert "questions of" not in captured.out  # before anything is asked

    def test_a_window_longer_than_the_context(self, capsys):
        Path("text.txt").write_text("很多字。" * 10, encoding="utf-8")
        words = ("benchmark=mmlu", "candidate.quantization=int4", *SMALL, "text_file=text.txt")
        assert command(*words, "text_window_tokens=100000") == 2
        assert "A window of 100000 tokens" in capsys.readouterr().err


def test_names_of_benchmarks():
    assert load_settings(COMMAND, ["benchmark=ceval,mmlu,ceval"]).names() == ["ceval", "mmlu"]
    assert load_settings(COMMAND, ["benchmark=all"]).names() == ["mmlu", "ceval", "gsm8k", "bbh"]
    assert load_settings(COMMAND, []).names() == ["ceval"]


def test_candidates_keep_what_the_candidate_names():
    config = load_settings(COMMAND, ["candidates=[int8,bf16]", "candidate.dtype=bfloat16"])
    assert [side.dtype for side in config.candidate_sides().values()] == ["bfloat16", "bfloat16"]
    with pytest.raises(ConfigError, match="`runs` names 1 folder"):
        CompareConfig(runs=["one"])
