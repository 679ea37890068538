"""What `train` says before the first step and after the last."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from glmtune.export.export import WRITERS
from glmtune.training.tracking.header import announce, header, intention, next_commands
from recipes.export import COMMAND as EXPORT
from recipes.predict import COMMAND as PREDICT
from recipes.train import COMMAND
from recipes.words.compose import load_settings


def settings(*words: str) -> dict[str, Any]:
    return dataclasses.asdict(load_settings(COMMAND, list(words)))


def test_a_bare_train_says_what_it_is_about_to_do() -> None:
    said = intention(settings())
    assert said.startswith("P-Tuning v2 of glm-tiny on shipped:ads/train.jsonl, into runs/train.")
    assert "`model=NAME_OR_FOLDER`" in said
    said = intention(settings("+recipe=lora", "model=chatglm3-6b", "data=files", "data.train_file=a.json"))
    assert said == "LoRA on chatglm3-6b on a.json, into runs/lora."
    assert intention(settings("+recipe=full", "model=x/y", "from_scratch=true")).startswith("Training from")


@pytest.mark.parametrize("recipe", ["ptuning", "lora", "full"])
@pytest.mark.parametrize(
    "more", [[], ["data=files", "data.train_file=a.json", "data.validation_file=b.json"]]
)
def test_the_next_commands_can_be_typed(recipe: str, more: list[str]) -> None:
    values = settings(f"+recipe={recipe}", "model=chatglm2-6b", *more)
    predict, export = next_commands(values, Path("runs/mine"))
    words = shlex.split(predict)
    assert words[:2] == ["glmtune", "predict"]
    found = load_settings(PREDICT, words[2:])
    asked = load_settings(EXPORT, shlex.split(export)[2:])
    assert asked.format in WRITERS
    assert found.data.test_file == ("b.json" if more else "shipped:ads/dev.jsonl")
    if recipe == "full":
        assert (found.model.source, asked.model.source) == ("runs/mine/last", "runs/mine/last")
    else:
        name = "prefix_path" if recipe == "ptuning" else "adapter_path"
        assert (getattr(found, name), getattr(asked, name)) == ("runs/mine", "runs/mine")
        assert (found.model.source, asked.model.source) == ("chatglm2-6b", "chatglm2-6b")


def test_after_a_gated_prefix_no_export_is_offered() -> None:
    predict, chat = next_commands(settings("+recipe=ptuning", "prefix.gate=true"), Path("runs/mine"))
    assert predict.startswith("glmtune predict prefix_path=runs/mine")
    assert chat == "glmtune chat prefix_path=runs/mine"


def test_the_header_counts(make_trainer: Any) -> None:
    trainer = make_trainer(max_steps=12, gradient_accumulation_steps=2)
    rows = dict(header(trainer, settings("+recipe=ptuning", "prefix.pre_seq_len=4")))
    tokens = sum(trainer.rows.train.lengths)
    assert rows["model"] == "glm-tiny, float32 on cpu"
    assert rows["trained"].startswith("P-Tuning v2, 4 positions: ")
    assert rows["data"] == f"shipped:ads/train.jsonl: 24 rows, {tokens:,} tokens"
    assert rows["evaluation"] == "10 rows held out"
    assert rows["batch"] == "8 rows = 4 x 2 accumulated x 1 process"
    assert rows["steps"] == "12 (4 epochs)"
    assert rows["folder"] == str(trainer.run_folder)


def test_a_run_opens_with_its_header_and_ends_with_the_next_command(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"content": f"a{n}", "summary": f"b{n}"}) for n in range(8)))
    words = ["+recipe=ptuning", f"model.source={tiny_base}", "data=files", f"data.train_file={rows}"]
    words += [
        "prefix.pre_seq_len=2",
        "trainer.max_steps=2",
        "trainer.report_to=[]",
        f"output_dir={tmp_path}/r",
    ]
    assert COMMAND.run(load_settings(COMMAND, words)) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"P-Tuning v2 of {tiny_base} on {rows}, into {tmp_path}/r.\n")
    assert said.err.index("held out") < said.err.index("step 2/2")
    predict, export = said.out.splitlines()[-2:]
    assert predict.startswith(f"next: glmtune predict prefix_path={tmp_path}/r model={tiny_base} data=files")
    assert export.startswith(f"or:   glmtune export prefix_path={tmp_path}/r ")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2", "GLMTUNE_LAUNCHED": "1"}, False),
    ],
    ids=["alone", "torchrun, first", "torchrun, second", "ours"],
)
def test_one_process_says_what_is_about_to_be_done(
    environment: dict[str, str],
    says: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "WORLD_SIZE", "GLMTUNE_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    announce(settings())
    assert capsys.readouterr().err.startswith("P-Tuning v2 of glm-tiny") is says


def test_a_prefix_on_a_base_without_an_official_form_goes_as_it_is() -> None:
    _, export = next_commands(settings("+recipe=ptuning"), Path("runs/mine"), model_type="glm4")
    assert "format=tuned" in export
