"""`glmtune eval` and `compare` from the command line: several answers, checkpoints, tables of runs, papers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from glmtune.cli import main
from glmtune.errors import ConfigError
from recipes.compare import CompareConfig
from recipes.eval import COMMAND, EvalConfig
from recipes.words.compose import load_settings

ASK = ("benchmark=gsm8k", "benchmark.data_dir=sample", "benchmark.limit=4", "benchmark.max_new_tokens=12",
       "num_threads=1")  # fmt: skip


pytestmark = pytest.mark.usefixtures("own_folder")


def read(path: str) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_several_answers_and_tables_of_runs(capsys: pytest.CaptureFixture[str]) -> None:
    words = (*ASK, "samples=3", "sampling.temperature=1.5", "report_to=tensorboard", "paper=true")
    assert main(["eval", *words, "output_dir=a"]) == 0
    shown = capsys.readouterr().out
    assert "3 answers at temperature 1.5" in shown
    assert "majority vote" in shown
    assert "compare 'runs=[a,OTHER_RUN]'" in shown or "compare runs=[a,OTHER_RUN]" in shown
    values = read("a/results.json")
    assert (values["num_samples"], values["num_answers"]) == (4, 3)
    texts = [Path(f"a/answer-{number}/answers.jsonl").read_text(encoding="utf-8") for number in (1, 2, 3)]
    written = {json.loads(text.splitlines()[0])["completion"] for text in texts}
    assert len(written) > 1, "at this temperature no two answers are alike"
    assert list(Path("a/runs").glob("events*"))
    before = Path("a/answers.jsonl").read_bytes()
    # The same seeds give the same answers, whatever else is in the batch.
    assert main(["eval", *words, "output_dir=again", "engine.batch_size=3"]) == 0
    assert Path("again/answers.jsonl").read_bytes() == before
    assert main(["eval", *words, "sampling.seed=1", "output_dir=b"]) == 0
    assert Path("b/answers.jsonl").read_bytes() != before
    assert main(["eval", *ASK, "output_dir=greedy"]) == 0
    capsys.readouterr()
    assert main(["compare", "runs=[a,b,greedy]", "output_dir=table", "paper=true"]) == 0
    shown = capsys.readouterr().out
    assert "Differences: gsm8k" in shown
    assert "Student's t of paired differences" in shown
    assert read("table/compare.json")["benchmarks"]["gsm8k"]["pairs"]["A - C"]["num_questions"] == 4
    assert Path("table/differences.pdf").is_file()
    with pytest.raises(ConfigError, match=r"only `gate\.confidence` and `gate\.average` count"):
        load_and_run("runs=[a,b]", "gate.max_drop_pp=2")


def load_and_run(*words: str) -> int:
    from recipes.compare import COMMAND as COMPARE
    from recipes.compare import run

    return run(load_settings(COMPARE, list(words)))


def test_every_checkpoint_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    from glmtune.models.load import load_official
    from glmtune.prefix.checkpoint import PrefixMeta, save_prefix
    from glmtune.prefix.encoder import PrefixEncoder, prefix_shape

    torch.manual_seed(0)
    model = load_official("glm-tiny")
    for number in (5, 10):
        encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=2)
        meta = PrefixMeta(base_fingerprint=model.fingerprint())
        save_prefix(encoder, Path(f"run/checkpoint-{number}"), meta=meta)
    ask = ("benchmark=exam", "benchmark.limit=2", "num_threads=1", "benchmark.max_new_tokens=8")
    words = (*ask, "checkpoints=run", "output_dir=curve", "paper=true", "report_to=[tensorboard]")
    assert main(["eval", *words]) == 0
    shown = capsys.readouterr().out
    assert "model  the base of run" in shown
    assert "model  checkpoint-10 of run" in shown
    assert "compare" in shown.rpartition("next: ")[2]
    values = read("curve/curve.json")
    assert [point["step"] for point in values["benchmarks"]["exam"]["points"]] == [0, 5, 10]
    for name in ("curve.png", "curve.svg", "curve.pdf", "curve.md", "tables.tex", "step-5/results.json"):
        assert (Path("curve") / name).is_file(), name
    adapters = [
        read(f"curve/step-{step}/results.json")["fingerprint"]["model"]["adapter"] for step in (0, 5, 10)
    ]
    assert adapters[0] == "none"
    assert len(set(adapters)) == 3
    prompts = {read(f"curve/step-{step}/results.json")["fingerprint"]["prompt_hash"] for step in (0, 5, 10)}
    assert len(prompts) == 1
    assert main(["eval", *words]) == 0
    assert capsys.readouterr().out.count("Going on: ") == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["samples=0"], "`samples` is 0"),
        (["sampling.temperature=0.5"], "`sampling` is given, but the likeliest answer"),
        (["samples=2", "sampling.temperature=0"], "`sampling.temperature` is 0"),
        (["samples=2", "completions=a.jsonl", "benchmark=bbh"], "but `completions` are there already"),
        (["checkpoints=run", "prefix_path=p"], "`prefix_path` is `p`, but `checkpoints` is `run`"),
        (["checkpoints=run", "backend=openai"], "`checkpoints` is `run`, but `backend` is `openai`"),
        (["report_to=[wanda]"], "`report_to`"),
        (["samples=2", "sampling.top_p=0"], "`sampling.top_p` is 0"),
    ],
    ids=["none", "nothing_drawn", "cold", "saved", "two_ways", "server", "tracker", "top_p"],
)
def test_settings_that_cannot_be_obeyed(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(COMMAND, words)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"runs": ["a"]}, "`runs` names 1 folder, but it must name two"),
        ({"cluster": "subject"}, "`cluster` is given, but it is of a table of finished `runs`"),
        ({"cluster": "document", "runs": ["a", "b", "c"]}, "`cluster`"),
    ],
    ids=["one_run", "no_runs", "unknown"],
)
def test_tables_that_cannot_be(settings: dict, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CompareConfig(**settings)
    assert expected in str(caught.value)


def test_choices_are_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from evaluation.backends import glm
    from recipes.eval import run

    monkeypatch.setattr(glm, "load_backend", lambda *a, **k: pytest.fail("a model was loaded"))
    words = ["benchmark=mmlu", "benchmark.data_dir=sample", "protocol=few_shot_direct", "samples=4"]
    with pytest.raises(ConfigError, match="compares probabilities and generates nothing"):
        run(load_settings(COMMAND, words))
    assert EvalConfig().samples is None
