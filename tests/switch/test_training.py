"""Runs with a switch: what they leave, that a killed one repeats it, and that a poor one is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from glmtune.adapter import load_adapter
from glmtune.data.dataset import load_split
from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError
from glmtune.loading import load_model, load_tokenizer
from glmtune.prefix.checkpoint import load_prefix
from glmtune.storage.manifest import read_manifest
from glmtune.switch.files import read_switch
from glmtune.switch.model import decide_prompts, switch_of
from glmtune.training.starting import switch_fitting
from glmtune.training.starting.switch_fitting import task_prompts
from recipes.train import COMMAND, run
from recipes.words.compose import load_settings


def write_rows(file: Path, texts: list[str]) -> Path:
    lines = [
        json.dumps({"content": text, "summary": f"写给{text[-2:]}。"}, ensure_ascii=False) for text in texts
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture
def train(tiny_base: Path, tmp_path: Path):
    """Train a few steps; task rows are of one form, general prompts of others."""
    task = [
        f"类型#{word}*颜色#{color}*数量#{n}"
        for n in range(6)
        for word in ("裙", "裤")
        for color in "红蓝白黑"
    ]
    general = [f"{n}加{m}等于多少？" for n in range(6) for m in range(8)]
    files = {
        "data.train_file": write_rows(tmp_path / "train.jsonl", task),
        "data.validation_file": write_rows(tmp_path / "dev.jsonl", [*task[:6], *general[:3]]),
    }
    (tmp_path / "general.jsonl").write_text(
        "\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in general), encoding="utf-8"
    )

    def trained(recipe: str, *more: str, folder: str = "run"):
        kind = "lora" if recipe == "lora" else "prefix"
        words = [f"+recipe={recipe}", "data=files", "data.layout=adgen", f"model.source={tiny_base}"]
        words += [f"{name}={file}" for name, file in files.items()]
        words += ["trainer.max_steps=4", "trainer.save_steps=2", "trainer.eval_steps=2", "retention=null"]
        words += ["trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=1"]
        words += ["prefix.pre_seq_len=4"] if kind == "prefix" else []
        words += [f"{kind}.switch=true", f"{kind}.switch_prompts={tmp_path / 'general.jsonl'}"]
        return run(load_settings(COMMAND, [*words, f"output_dir={tmp_path / folder}", *more]))

    return trained


def rule_of(folder: Path, base: Path, recipe: str):
    if recipe == "lora":
        return read_switch(folder)
    return load_prefix(folder, load_model(base, device="cpu")).switch


@pytest.mark.parametrize("recipe", ["ptuning", "lora"])
def test_a_run_leaves_it_and_a_killed_one_repeats_it(train, recipe, tiny_base, tmp_path, capsys, monkeypatch):
    results = train(recipe).results
    shown = capsys.readouterr().err
    said = results["switch"]
    assert f"switch: AUROC {said['auroc']:.3f}, task prompts off" in shown
    assert said["saved"]
    assert said["auroc"] >= 0.99
    assert (said["num_task"], said["num_general"]) == (16, 16)
    run_folder = tmp_path / "run"
    rules = [
        rule_of(run_folder / name, tiny_base, recipe)
        for name in ("last", "best", "checkpoint-2", "checkpoint-4")
    ]
    assert len({rule.fingerprint for rule in rules}) == 1
    assert (read_manifest(run_folder / "last") or {})["switch"] == said
    assert "| switch | AUROC" in (run_folder / "README.md").read_text(encoding="utf-8")
    # The three general rows among the nine of the evaluation have the base's loss, which training raises.
    assert results["switched_eval_loss"] != results["final_eval_loss"]
    # Killed behind step 2, and gone on with: nothing is fitted again.
    again = tmp_path / "again"
    shutil.copytree(run_folder, again)
    for name in ("last", "best", "checkpoint-4"):
        shutil.rmtree(again / name)
    (again / "all_results.json").unlink()
    monkeypatch.setattr(switch_fitting, "fit_logistic", lambda *_: pytest.fail("it is in the checkpoint"))
    resumed = train(recipe, folder="again").results
    names = (
        ["prefix_encoder.safetensors"]
        if recipe == "ptuning"
        else ["adapter_model.safetensors", "switch.safetensors"]
    )
    for name in names:
        assert (again / "last" / name).read_bytes() == (run_folder / "last" / name).read_bytes()
    for name in ("switch", "switched_eval_loss", "final_eval_loss"):
        assert resumed[name] == results[name]


def test_the_loss_of_the_switched_model(train, tiny_base, tmp_path):
    """Row by row: the tuned model's loss where the rule says so, else the base's, one mean over all tokens."""
    results = train("ptuning").results
    base, tuned = (
        load_model(tiny_base, device="cpu"),
        load_model(tiny_base, prefix=tmp_path / "run", device="cpu"),
    )
    rule = switch_of(tuned)
    assert rule is not None
    data = DataSettings(
        layout="adgen", train_file=str(tmp_path / "train.jsonl"), validation_file=str(tmp_path / "dev.jsonl")
    )
    tokenizer = load_tokenizer(tiny_base)
    lengths = load_split(data, "train", tokenizer, context=512).settings
    split = load_split(lengths, "validation", tokenizer)
    prompts = task_prompts(split)
    decided = decide_prompts(tuned, rule, [torch.tensor(prompt) for prompt in prompts]).tolist()
    assert decided == [True] * 6 + [False] * 3
    loss, count = 0.0, 0
    for row, is_on in zip(split.rows, decided, strict=True):
        model = tuned if is_on else base
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        num = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            loss += float(model(input_ids=ids, labels=labels).loss) * num
        count += num
    assert results["switched_eval_loss"] == pytest.approx(loss / count, rel=1e-4)


def test_what_cannot_be_told_apart_has_none(train, tiny_base, tmp_path, capsys):
    """General prompts that are the task's own: the run's result is kept, and all is said."""
    results = train("ptuning", f"prefix.switch_prompts={tmp_path / 'train.jsonl'}").results
    said = results["switch"]
    assert (said["saved"], said["min_auroc"]) == (False, 0.99)
    assert said["auroc"] < 0.99
    assert "switched_eval_loss" not in results
    shown = capsys.readouterr().err
    assert "No switch is saved: AUROC must be at least 0.99" in shown
    assert load_prefix(tmp_path / "run", load_model(tiny_base, device="cpu")).switch is None
    forced = train(
        "ptuning",
        f"prefix.switch_prompts={tmp_path / 'train.jsonl'}",
        "prefix.switch_min_auroc=0",
        folder="b",
    )
    assert forced.results["switch"]["saved"]
    assert load_prefix(tmp_path / "b", load_model(tiny_base, device="cpu")).switch is not None


def test_without_general_prompts(train, tiny_base, tmp_path):
    said = train("lora", "lora.switch_prompts=none").results["switch"]
    assert (said["kind"], said["auroc"], said["general_on"], said["saved"]) == ("one_class", None, None, True)
    assert switch_of(load_adapter(tmp_path / "run", load_model(tiny_base, device="cpu"))) is not None


def test_too_few_prompts(train, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "你好"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="there are 1 general prompts, and it takes at least 24"):
        train("ptuning", f"prefix.switch_prompts={few}")
    assert not (tmp_path / "run" / "config.yaml").exists()
