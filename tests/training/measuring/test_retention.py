"""Retention, measured at every evaluation: training goes on as if nobody had looked, and everybody is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glmtune.errors import CheckpointError, ConfigError
from glmtune.training.log import read_log
from glmtune.training.measuring.report import retention_section
from recipes.train import COMMAND, TrainResult, run
from recipes.words.compose import load_settings

PROMPTS = ["你好", "2 + 3 = ?", "Which fruit?", "晚上睡不着怎么办？", "还剩几个苹果？", "How many apples?"]
CLOCK = {"time", "tokens_per_second", "seconds_per_step", "memory_bytes", "eval_runtime"}
CLOCK |= {"eval_retention_runtime", "checksum"}
FIGURES = {"eval_retention", "eval_retention_kl", "eval_leak_rate"}
WEIGHTS = {"ptuning_official": "prefix_encoder", "full": "model", "lora": "adapter_model"}
Train = Callable[..., TrainResult]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": text, "category": "chat"}, ensure_ascii=False) for text in PROMPTS]
    file.write_text("\n".join(rows), encoding="utf-8")
    return file


@pytest.fixture
def train(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path, prompts: Path) -> Train:
    """Train on the tiny base, in a folder of ``tmp_path``; further words are overrides."""

    def run_it(folder: str, *more: str, recipe: str = "ptuning_official") -> TrainResult:
        own = {"ptuning_official": ["prefix.pre_seq_len=4", "prefix.dropout=0.3"], "lora": ["lora.rank=2"]}
        words = [
            *(f"+recipe={recipe}", *own.get(recipe, []), "data=files", "data.layout=adgen"),
            *("trainer.max_steps=4", "trainer.per_device_train_batch_size=4", "trainer.logging_steps=1"),
            *("trainer.gradient_accumulation_steps=1", "trainer.eval_steps=2", "trainer.save_steps=2"),
            *("trainer.learning_rate=3e-2", "trainer.report_to=[]", f"retention.prompts={prompts}"),
            *(f"model.source={tiny_base}", f"data.train_file={tiny_rows['train']}"),
            f"data.validation_file={tiny_rows['validation']}",
            *("retention.max_new_tokens=8", f"output_dir={tmp_path / folder}"),
        ]
        return run(load_settings(COMMAND, [*words, *more]))

    return run_it


def learnt(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock and what is measured of retention."""
    entries = [
        {name: value for name, value in entry.items() if name not in CLOCK | FIGURES}
        for entry in read_log(folder)
    ]
    return [entry for entry in entries if "loss" in entry or "eval_loss" in entry]


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("ptuning_official", []),
        ("full", ["trainer.gradient_checkpointing=true"]),
        ("lora", ["lora.dropout=0.3"]),
    ],
)
def test_training_is_the_same_to_the_last_bit(
    recipe: str, more: list[str], train: Train, tmp_path: Path
) -> None:
    on = train("on", *more, recipe=recipe)
    off = train("off", *more, "retention=null", recipe=recipe)
    assert learnt(tmp_path / "on") == learnt(tmp_path / "off")
    for name in ("last", "best"):
        one, two = (
            load_file(done.output_dir / name / f"{WEIGHTS[recipe]}.safetensors") for done in (on, off)
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert not (tmp_path / "off" / "retention").exists()
    assert not any("retention" in name for name in off.results)


def test_what_a_run_says(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train("run").results
    folder = tmp_path / "run"
    measured = [entry for entry in read_log(folder) if "eval_retention" in entry]
    assert [entry["step"] for entry in measured] == [2, 4]
    assert measured[0]["eval_retention_kl"] > 0, "a new prefix is not the base"
    rows = [json.loads(line) for line in (folder / "retention" / "step-4.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert measured[1]["eval_retention"] == sum(row["identical"] for row in rows) / 6
    assert measured[1]["eval_leak_rate"] == sum(row["leaks"] for row in rows) / 6
    assert all(row["identical"] == (row["base"] == row["tuned"]) for row in rows)
    for name in FIGURES:
        assert result[f"final_{name}"] == measured[1][name]
        assert result[f"best_{name}"] in (measured[0][name], measured[1][name])
    assert result["retention_prompts"] == 6
    assert 0 < result["retention_seconds"] <= result["run_seconds"]
    worst = result["retention_worst"]
    assert worst
    assert worst == sorted(worst, key=lambda row: (not row["leaks"], -row["kl"]))
    manifest = json.loads((folder / "checkpoint-4" / "checkpoint.json").read_text())
    head = json.loads((folder / "retention" / "base.jsonl").read_text().splitlines()[0])
    assert manifest["retention_fingerprint"] == head["fingerprint"]
    assert (folder / "retention.png").read_bytes().startswith(b"\x89PNG")
    assert "## What is left of the base" in (folder / "README.md").read_text()
    said = capsys.readouterr()
    assert f"kept {measured[1]['eval_retention']:.1%}".replace("%", " %") in said.err
    assert "retention: 6 prompts, " in said.out


def test_without_rows_to_evaluate_on_the_end_is_measured(train: Train, tmp_path: Path) -> None:
    result = train("run", "data.validation_file=null", "trainer.eval_steps=null").results
    log = read_log(tmp_path / "run")
    assert [entry["step"] for entry in log if "eval_retention" in entry] == [4]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4], "the last step keeps its line"
    assert "final_eval_retention" in result
    assert "best_eval_retention" not in result
    assert (tmp_path / "run" / "retention.png").is_file()


def test_best_keeps_the_target(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missed = train("missed", "retention.target=1", "trainer.early_stopping_patience=1").results
    found = missed["retention_target"]
    assert found["target"] == 1
    assert found["highest"] < 1
    assert "best_step" not in missed
    assert not (tmp_path / "missed" / "best").exists()
    assert missed["steps"] == 2, "an evaluation that may not be the best is none for patience either"
    assert f"the most was {found['highest']:.1%}, at step 2".replace("%", " %") in capsys.readouterr().out
    reached = train("reached", "retention.target=0").results
    assert reached["best_step"] in (2, 4)
    assert (tmp_path / "reached" / "best").is_dir()


def test_target_is_obeyed_after_resuming(train: Train, tmp_path: Path) -> None:
    train("run", "retention.target=1", "trainer.max_steps=2")
    with pytest.raises(ConfigError, match=r"`retention.target`: 1.* then, 0.* now"):
        train("run", "retention.target=0", "trainer.max_steps=2", "resume=force")
    train("run", "retention.target=1", "resume=force")
    assert not (tmp_path / "run" / "best").exists()


def test_going_on_reads_what_the_base_answered(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    whole = train("whole")
    train("run")
    base = (folder / "retention" / "base.jsonl").read_bytes()
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "all_results.json").unlink()
    held = folder / "retention" / "base.safetensors"
    content = held.read_bytes()
    held.unlink()
    with pytest.raises(CheckpointError, match=r"base\.safetensors cannot be used"):
        train("run")
    held.write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match=r"base\.safetensors cannot be used"):
        train("run")
    held.write_bytes(content)
    (folder / "retention" / "base.jsonl").write_bytes(base.replace("你好".encode(), "您好".encode()))
    with pytest.raises(CheckpointError, match=r"base\.jsonl"):
        train("run")
    (folder / "retention" / "base.jsonl").write_bytes(base)
    again = train("run")
    measured = {name: value for name, value in again.results.items() if "eval" in name}
    assert measured == {name: value for name, value in whole.results.items() if "eval" in name}
    with pytest.raises(ConfigError, match=r"`retention.max_new_tokens`: 8 then, 4 now"):
        train("run", "retention.max_new_tokens=4", "resume=force")


def test_other_answers_than_the_checkpoint_knows_are_refused(train: Train, tmp_path: Path) -> None:
    train("run")
    train("other", "retention.num_prompts=3")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "all_results.json").unlink()
    shutil.rmtree(tmp_path / "run" / "retention")
    shutil.copytree(tmp_path / "other" / "retention", tmp_path / "run" / "retention")
    with pytest.raises(ConfigError, match="another retention fingerprint"):
        train("run")


def test_measuring_may_begin_and_end_on_the_way_while_there_is_a_base(train: Train, tmp_path: Path) -> None:
    for recipe in ("ptuning_official", "full"):
        train(recipe, "retention=null", "trainer.max_steps=2", recipe=recipe)
    assert "final_eval_retention" in train("ptuning_official", "resume=force").results
    with pytest.raises(ConfigError, match=r"all weights are tuned.*Add `retention=null`"):
        train("full", "resume=force", recipe="full")
    assert train("full", "resume=force", "retention=null", recipe="full").steps == 4


def test_a_branch_brings_the_base_along(train: Train, tmp_path: Path) -> None:
    train("run", recipe="full")
    done = train("branch", f"resume={tmp_path / 'run' / 'checkpoint-2'}", recipe="full")
    whole, branch = (tmp_path / name / "retention" / "step-4.jsonl" for name in ("run", "branch"))
    assert branch.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "branch" / "retention" / "step-2.jsonl").exists()
    assert done.steps == 4


def test_an_exam_is_asked_before_and_after(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("retention.exam=ceval", "retention.exam_limit=1")
    exam = train("run", *words).results["retention_exam"]
    folder = tmp_path / "run" / "retention" / "exam"
    assert {path.name for path in folder.iterdir()} == {"base", "step-4"}
    before = json.loads((folder / "base" / "results.json").read_text())
    assert exam["benchmark"] == "ceval"
    assert exam["num_questions"] == before["num_samples"]
    assert exam["num_right"] == round(before["accuracy_micro"] * before["num_samples"])
    assert "answers that the base had right" in capsys.readouterr().out
    assert "answers that the base had right" in (tmp_path / "run" / "README.md").read_text()
    # Killed after the last checkpoint: nothing is asked again that was answered.
    (tmp_path / "run" / "all_results.json").unlink()
    stamp = (folder / "base" / "answers.jsonl").stat().st_mtime_ns
    assert train("run", *words).results["retention_exam"] == exam
    assert (folder / "base" / "answers.jsonl").stat().st_mtime_ns == stamp


def test_full_tuning_cannot_ask_its_base_later(train: Train) -> None:
    train("run", "trainer.max_steps=2", recipe="full")
    with pytest.raises(ConfigError, match=r"`retention.exam` is `ceval`.*no base to ask"):
        train("run", "resume=force", "retention.exam=ceval", "retention.exam_limit=1", recipe="full")


def test_random_weights_have_nothing_to_keep(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    result = train("run", "from_scratch=true", recipe="full").results
    assert "retention is not measured: random weights" in capsys.readouterr().err
    assert not any("retention" in name for name in result)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["retention.target=0.9", "data.validation_file=null", "trainer.eval_steps=null"],
            "nothing is evalua",
        ),
        (["from_scratch=true", "retention.target=0.9"], r"`retention.target` is 0.9, but `from_scratch`"),
        (["from_scratch=true", "retention.exam=ceval"], r"`retention.exam` is ceval, but `from_scratch`"),
        (["retention.exam_limit=3"], "nothing is asked"),
        (["retention.exam=nothing"], "nothing"),
    ],
)
def test_contradictions(words: list[str], said: str, train: Train) -> None:
    with pytest.raises(ConfigError, match=said):
        train("run", *words, recipe="full")


def test_answers_are_no_markup_in_the_card() -> None:
    row = {"prompt": "a | b\n<b>", "base": "`x` *y*", "tuned": "[z](w) \u202e # " + "長" * 500}
    text = retention_section(
        {
            **{"final_eval_retention": 0.5, "final_eval_retention_kl": 1.0, "final_eval_leak_rate": 0.25},
            **{"retention_prompts": 200, "retention_worst": [row]},
        }
    )
    line = text.splitlines()[-1]
    assert line.startswith(r"| a \| b \<b\> | \`x\` \*y\* | \[z\](w) \# ")
    assert line.endswith("長… |")
    assert "\u202e" not in line
