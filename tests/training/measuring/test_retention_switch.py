"""Retention of a model with a switch: measured as users will have it, the switch obeyed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glmtune.inference.predict.generate import generate_completions
from glmtune.inference.settings import GenerationSettings
from glmtune.loading import load_model, load_tokenizer
from glmtune.retention.base_answers import read_answers
from glmtune.retention.measure import ask
from glmtune.switch.model import switch_of
from glmtune.switch.rule import Switch, SwitchFacts
from glmtune.training.log import read_log
from glmtune.training.starting import switch_fitting
from recipes.train import COMMAND, TrainResult, run
from recipes.words.compose import load_settings

TASK = [
    f"类型#{word}*颜色#{color}*数量#{n}" for n in range(6) for word in ("裙", "裤") for color in "红蓝白黑"
]
GENERAL = [f"{n}加{m}等于多少？" for n in range(6) for m in range(8)]
ASKED = [*GENERAL[:4], *TASK[:3], "7加7等于多少？"]
PATH = {"ptuning": "prefix", "lora": "adapter"}
Train = Callable[..., TrainResult]


def write_rows(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def train(tiny_base: Path, tmp_path: Path) -> Train:
    """Train a few strong steps on task rows of one form; general prompts are of another."""
    rows = [{"content": text, "summary": f"写给{text[-2:]}。"} for text in TASK]
    task = write_rows(tmp_path / "train.jsonl", rows)
    general = write_rows(tmp_path / "general.jsonl", [{"prompt": text} for text in GENERAL])
    asked = write_rows(tmp_path / "asked.jsonl", [{"prompt": text} for text in ASKED])

    def trained(recipe: str, *more: str, folder: str = "run") -> TrainResult:
        kind = "lora" if recipe == "lora" else "prefix"
        own = {"lora": ["lora.dropout=0"], "prefix": ["prefix.pre_seq_len=4", "prefix.dropout=0"]}[kind]
        words = [
            *(f"+recipe={recipe}", *own, "data=files", "data.layout=adgen", f"model.source={tiny_base}"),
            *(f"data.train_file={task}", f"data.validation_file={task}", "trainer.learning_rate=3e-2"),
            *("trainer.max_steps=4", "trainer.save_steps=2", "trainer.eval_steps=2", "trainer.report_to=[]"),
            *("trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=1"),
            *(f"{kind}.switch=true", f"{kind}.switch_prompts={general}", f"retention.prompts={asked}"),
            *("retention.max_new_tokens=8", f"output_dir={tmp_path / folder}"),
        ]
        return run(load_settings(COMMAND, [*words, *more]))

    return trained


def answered(run: Path, step: int) -> list[dict[str, Any]]:
    lines = (run / "retention" / f"step-{step}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def greedy(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[tuple[str, bool | None]]:
    """Answers as `predict` gives them, and whether the switch was on, in the order of the prompts."""
    made = generate_completions(model, tokenizer, prompts, GenerationSettings(max_new_tokens=8))
    found = {answer.index: (answer.text, answer.is_tuned) for answer in made}
    return [found[place] for place in range(len(prompts))]


@pytest.mark.parametrize("recipe", ["ptuning", "lora"])
def test_the_figures_are_those_of_the_model_in_use(
    recipe: str, train: Train, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(recipe).results
    folder, tokenizer = tmp_path / "run", load_tokenizer(tiny_base)
    base = read_answers(folder / "retention" / "base.jsonl", tokenizer)
    where: dict[str, Any] = {PATH[recipe]: folder}
    tuned: Any = load_model(tiny_base, device="cpu", **where)
    assert switch_of(tuned) is not None
    used = greedy(tuned, tokenizer, base.prompt_ids)
    rows = answered(folder, 4)
    assert [row["switched_off"] for row in rows] == [is_on is False for _, is_on in used]
    assert [row["switched_off"] for row in rows] == [True] * 4 + [False] * 3 + [True]
    assert [row["tuned"] for row in rows] == [text for text, _ in used]
    assert all(
        row["identical"] and not row["leaks"] and row["kl"] == 0 for row in rows if row["switched_off"]
    )
    assert not any(row["identical"] or row["kl"] == 0 for row in rows if not row["switched_off"])
    assert result["final_eval_retention"] == sum(row["identical"] for row in rows) / 8 == 5 / 8
    assert result["final_eval_retention_switched_off"] == 5 / 8
    tokens = [len(ids) for ids in base.answer_ids]
    kl = sum(row["kl"] * count for row, count in zip(rows, tokens, strict=True)) / sum(tokens)
    assert result["final_eval_retention_kl"] == pytest.approx(kl, rel=1e-6)
    assert {row["prompt"] for row in result["retention_worst"]} == set(TASK[:3])
    assert "switched off 62.5 %" in capsys.readouterr().err
    assert "The switch left 62.5 % of these prompts to the base" in (folder / "README.md").read_text()


def test_what_is_switched_off_is_not_asked(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from glmtune.training.measuring import retention

    asked: list[list[int]] = []

    def noting(model: Any, tokenizer: Any, base: Any, which: Any, **rest: Any) -> Any:
        asked.append(list(which))
        return ask(model, tokenizer, base, which, **rest)

    monkeypatch.setattr(retention, "ask", noting)
    train("ptuning")
    assert asked == [[4, 5, 6], [4, 5, 6]]


def test_all_may_be_off(train: Train, tmp_path: Path) -> None:
    general = tmp_path / "general.jsonl"
    result = train("ptuning", f"retention.prompts={general}", "retention.num_prompts=5").results
    assert result["final_eval_retention"] == result["final_eval_retention_switched_off"] == 1
    assert result["final_eval_retention_kl"] == result["final_eval_leak_rate"] == 0
    assert result["retention_worst"] == []


def test_without_a_switch_kept_all_are_asked(train: Train, tmp_path: Path) -> None:
    """The rule that is not saved plays no part: the model in use has none."""
    result = train("ptuning", f"prefix.switch_prompts={tmp_path / 'train.jsonl'}").results
    assert not result["switch"]["saved"]
    assert not any("switched_off" in name for name in result)
    rows = answered(tmp_path / "run", 4)
    assert not any(row["switched_off"] for row in rows)
    assert all(row["kl"] > 0 for row in rows)


def test_best_obeys_the_target_with_the_switch(train: Train, tmp_path: Path) -> None:
    kept = train("ptuning", "retention.target=0.6").results
    assert kept["best_eval_retention"] == kept["best_eval_retention_switched_off"] == 5 / 8
    assert (tmp_path / "run" / "best").is_dir()
    without = train("ptuning", "retention.target=0.6", "prefix.switch=false", folder="without").results
    assert without["retention_target"]["highest"] < 0.6


@pytest.mark.parametrize("recipe", ["ptuning", "lora"])
def test_the_exam_is_sat_with_the_switch(
    recipe: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a rule that is never on, what sits the exam at the end is the base, number by number."""

    def never(task: Tensor, general: Tensor) -> Switch:
        return Switch(torch.zeros(task.shape[1]), -1.0, SwitchFacts("logistic", 1.0, 0.0, 0.0, 24, 24))

    monkeypatch.setattr(switch_fitting, "fit_logistic", never)
    words = ("retention.exam=ceval", "retention.exam_limit=1")
    exam = train(recipe, *words).results["retention_exam"]
    kind = "lora" if recipe == "lora" else "prefix"
    train(recipe, *words, f"{kind}.switch=false", folder="without")

    def sat(folder: str, name: str) -> list[Any]:
        file = tmp_path / folder / "retention" / "exam" / name / "answers.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        return [{key: value for key, value in row.items() if key != "checksum"} for row in rows[1:]]

    assert exam["kept"] == 1
    assert exam["num_gained"] == 0
    assert sat("run", "step-4") == sat("run", "base") != []
    assert sat("without", "step-4") != sat("without", "base") == sat("run", "base")
    # Killed between the last checkpoint and the report: the switch comes from the checkpoint.
    (tmp_path / "run" / "all_results.json").unlink()
    shutil.rmtree(tmp_path / "run" / "retention" / "exam" / "step-4")
    assert train(recipe, *words).results["retention_exam"] == exam
    assert sat("run", "step-4") == sat("run", "base")


def test_a_resumed_run_measures_the_same(train: Train, tmp_path: Path) -> None:
    whole = train("ptuning").results
    folder = tmp_path / "run"
    rows, log = answered(folder, 4), read_log(folder)
    for name in ("last", "best", "checkpoint-4"):
        shutil.rmtree(folder / name)
    (folder / "all_results.json").unlink()
    (folder / "retention" / "step-4.jsonl").unlink()
    resumed = train("ptuning").results
    assert answered(folder, 4) == rows
    for name in ("eval_retention", "eval_retention_kl", "eval_leak_rate", "eval_retention_switched_off"):
        assert [each[name] for each in read_log(folder) if name in each] == [
            each[name] for each in log if name in each
        ]
        assert resumed[f"final_{name}"] == whole[f"final_{name}"]
