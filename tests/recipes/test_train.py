"""The train command: from settings to a run folder, and from wrong settings to short errors."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from glmtune import load_model
from glmtune.cli import main
from glmtune.errors import ConfigError, GlmtuneError
from glmtune.training.log import read_log
from recipes.train import COMMAND, TrainResult, run
from recipes.words.compose import load_settings

REPO = Path(__file__).resolve().parents[2]
SMALL = [
    "retention=null",
    "data=files",
    "data.layout=adgen",
    "trainer.max_steps=6",
    "trainer.per_device_train_batch_size=4",
    "trainer.gradient_accumulation_steps=1",
    "trainer.logging_steps=2",
    "trainer.eval_steps=3",
    "trainer.save_steps=4",
]


@pytest.fixture
def command_line(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path) -> list[str]:
    """Overrides of a small run on the tiny base, in ``tmp_path/run``."""
    return [
        "+recipe=ptuning",
        *SMALL,
        f"model.source={tiny_base}",
        "prefix.pre_seq_len=4",
        f"data.train_file={tiny_rows['train']}",
        f"data.validation_file={tiny_rows['validation']}",
        f"output_dir={tmp_path / 'run'}",
    ]


def trained(command_line: list[str], *more: str) -> TrainResult:
    return run(load_settings(COMMAND, [*command_line, *more]))


def test_run_folder(command_line: list[str], tiny_base: Path, tmp_path: Path) -> None:
    result = trained(command_line)
    folder = tmp_path / "run"
    assert (result.steps, result.stopped_by, result.output_dir) == (6, None, folder)
    names = {"config.yaml", "environment.json", "trainer_log.jsonl", "runs", "training_loss.png", "README.md"}
    assert names | {"all_results.json", "checkpoint-4", "checkpoint-6", "last", "best"} == {
        path.name for path in folder.iterdir()
    }
    results = json.loads((folder / "all_results.json").read_text())
    assert results == result.results
    log = read_log(folder)
    assert [(entry["step"], "loss" in entry) for entry in log] == [
        *[(0, False), (2, True), (3, False), (4, True), (6, True), (6, False)]
    ]
    assert results["baseline_eval_loss"] == log[0]["eval_loss"]
    assert results["final_eval_loss"] < results["baseline_eval_loss"]
    assert results["best_step"] == json.loads((folder / "best" / "checkpoint.json").read_text())["step"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["prefix"]["pre_seq_len"], config["tune"], config["seed"]) == (4, "prefix", 42)
    inputs = torch.tensor([[64, 65, 66]])
    with torch.no_grad():
        tuned = load_model(tiny_base, prefix=folder / "last", device="cpu")(input_ids=inputs).logits
        bare = load_model(tiny_base, device="cpu")(input_ids=inputs).logits
    assert not torch.equal(tuned, bare)


def test_finished_run_is_not_repeated(command_line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first = trained(command_line)
    weights = first.output_dir / "last" / "prefix_encoder.safetensors"
    stamp = weights.stat().st_mtime_ns
    again = trained(command_line)
    assert again.results == first.results
    assert weights.stat().st_mtime_ns == stamp
    assert "finished at step 6" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"trainer.max_steps`: 6 then, 8 now"):
        trained(command_line, "trainer.max_steps=8")
    assert trained(command_line, "trainer.max_steps=8", "resume=force").steps == 8
    fresh = trained(command_line, "resume=never")
    assert fresh.steps == 6
    assert (first.output_dir / "previous" / "1" / "checkpoint-8").is_dir()


def test_other_data_under_the_same_name_is_refused(
    command_line: list[str], tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.json"
    rows.write_bytes(tiny_rows["train"].read_bytes())
    trained(command_line, f"data.train_file={rows}")
    (tmp_path / "run" / "all_results.json").unlink()
    rows.write_bytes(tiny_rows["validation"].read_bytes())
    with pytest.raises(ConfigError, match=r"another data fingerprint: .* then, .* now"):
        trained(command_line, f"data.train_file={rows}")


@pytest.mark.parametrize(
    ("recipe", "weights"),
    [
        ("full", "model.safetensors"),
        ("lora", "adapter_model.safetensors"),
        ("ptuning", "prefix_encoder.safetensors"),
    ],
)
def test_every_way_of_tuning_learns(
    recipe: str, weights: str, command_line: list[str], tmp_path: Path
) -> None:
    more = [word for word in command_line[1:] if recipe == "ptuning" or not word.startswith("prefix.")]
    more += ["trainer.learning_rate=3e-2", "trainer.gradient_checkpointing=true", "trainer.report_to=[]"]
    result = run(load_settings(COMMAND, [f"+recipe={recipe}", *more]))
    assert result.results["final_eval_loss"] < result.results["baseline_eval_loss"]
    assert load_file(tmp_path / "run" / "last" / weights)
    assert not (tmp_path / "run" / "runs").exists()


def test_from_scratch_then_tuned(command_line: list[str], tmp_path: Path) -> None:
    """A model made from a config alone is a base like any other."""
    more = [word for word in command_line[1:] if not word.startswith("prefix.")]
    made = tmp_path / "made"
    run(load_settings(COMMAND, ["+recipe=full", "from_scratch=true", *more, f"output_dir={made}"]))
    result = trained(command_line, f"model.source={made / 'last'}")
    assert result.steps == 6


def test_packing_sees_the_same_rows(command_line: list[str], tmp_path: Path) -> None:
    padded = trained(command_line, "trainer.num_train_epochs=1", "trainer.max_steps=null")
    packed = trained(
        command_line,
        *(
            "data.packing=true",
            "data.packing_length=256",
            "trainer.num_train_epochs=1",
            "trainer.max_steps=null",
        ),
        f"output_dir={tmp_path / 'packed'}",
    )
    tokens = [read_log(result.output_dir)[-2]["tokens"] for result in (padded, packed)]
    assert tokens[0] == tokens[1]
    assert packed.results["baseline_eval_loss"] == pytest.approx(
        padded.results["baseline_eval_loss"], rel=1e-5
    )
    assert packed.steps < padded.steps


def test_without_validation_rows(command_line: list[str], tmp_path: Path) -> None:
    result = trained(command_line, "data.validation_file=null", "trainer.eval_steps=null")
    assert "final_eval_loss" not in result.results
    assert not (tmp_path / "run" / "best").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.max_steps=0"], ["`trainer.max_steps` is 0", "at least 1"]),
        (["tune=prefx"], ["`tune` is `prefx`", "Did you mean `prefix`"]),
        (["prefix=null"], ["`prefix` is null", "+recipe=ptuning"]),
        (["tune=full"], ["`prefix` has settings", "`tune` is `full`", "prefix=null"]),
        (["from_scratch=true"], ["`from_scratch` is true", "tune=full"]),
        (["data.validation_file=null"], ["`trainer.eval_steps` is 3", "trainer.eval_steps=null"]),
        (["trainer.precision=fp16"], ["fp16", "needs a GPU"]),
        (["model.source=glm-tin"], ["glm-tin", "glm-tiny"]),
        (["data.train_file=/no/such/file.json"], ["/no/such/file.json"]),
        (["resume=/no/such/checkpoint-3"], ["/no/such/checkpoint-3", "no complete checkpoint"]),
    ],
)
def test_refused(overrides: list[str], words: list[str], command_line: list[str]) -> None:
    with pytest.raises(GlmtuneError) as caught:
        trained(command_line, *overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(command_line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *command_line, "model.device=cuda"]) == 2
    assert "`model.device` is `cuda`" in capsys.readouterr().err


def test_wrong_column(command_line: list[str]) -> None:
    columns = ["data.layout=columns", "data.prompt_column=question", "data.response_column=summary"]
    with pytest.raises(GlmtuneError, match="question"):
        trained(command_line, *columns)


def test_recipes_scale_with_the_model() -> None:
    def settings(*overrides: str) -> Any:
        return load_settings(COMMAND, ["+recipe=ptuning", *overrides])

    tiny, large, folder = settings(), settings("model=chatglm2-6b"), settings("model.source=/my/model")
    assert (large.prefix.pre_seq_len, large.trainer.learning_rate, large.trainer.max_steps) == (
        128,
        2e-2,
        3000,
    )
    assert (large.trainer.per_device_train_batch_size, large.trainer.gradient_accumulation_steps) == (1, 16)
    assert (large.data.max_source_length, large.data.max_target_length) == (64, 128)
    assert folder.trainer == large.trainer
    assert tiny.trainer.max_steps < 1000
    assert settings("prefix.pre_seq_len=7").prefix.pre_seq_len == 7
    chat = load_settings(COMMAND, ["+recipe=ptuning_chat", "model=chatglm2-6b", "data.train_file=chats.json"])
    assert (chat.trainer.learning_rate, chat.data.max_source_length, chat.data.max_target_length) == (
        1e-2,
        256,
        256,
    )


@pytest.mark.parametrize(
    ("script", "environment", "words"),
    [
        ("train_ptuning.sh", {}, ["glmtune train +recipe=ptuning data=adgen model.source=glm-tiny a=b"]),
        (
            "train_ptuning.sh",
            {"PRE_SEQ_LEN": "64", "LR": "1e-2", "MODEL": "chatglm2-6b", "DATA": "ads", "OUTPUT_DIR": "out"},
            [
                "data=ads model.source=chatglm2-6b",
                "output_dir=out prefix.pre_seq_len=64 trainer.learning_rate=1e-2 a=b",
            ],
        ),
        (
            "train_ptuning.sh",
            {"NUM_GPUS": "2"},
            ["torchrun --standalone --nnodes=1 --nproc-per-node=2 -m glmtune train"],
        ),
        (
            "train_chat.sh",
            {
                "CHAT_TRAIN_DATA": "c.json",
                "CHAT_VAL_DATA": "v.json",
                "CHECKPOINT_NAME": "o",
                "PRE_SEQ_LEN": "8",
            },
            [
                "+recipe=ptuning_chat",
                "data.train_file=c.json data.validation_file=v.json prefix.pre_seq_len=8 a=b",
            ],
        ),
        ("train_chat.sh", {}, ["CHAT_TRAIN_DATA is empty"]),
    ],
)
def test_scripts(script: str, environment: dict[str, str], words: list[str], tmp_path: Path) -> None:
    """Stand-ins for the programs print how they are called."""
    for program in ("glmtune", "torchrun"):
        (tmp_path / program).write_text(f'#!/bin/sh\necho {program} "$@"\n')
        (tmp_path / program).chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name not in ("LR", "MODEL", "NUM_GPUS")}
    done = subprocess.run(
        ["bash", str(REPO / "scripts" / script), "a=b"],
        env={**clean, **environment, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    text = (done.stdout + done.stderr).replace("output_dir=runs/ptuning ", "")
    assert all(word in text for word in words), text
    assert done.returncode == (2 if "empty" in words[0] else 0)
