"""`glmtune plan` from the command line, and what `plan.enforce` does in `glmtune train`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from glmtune.cli import main
from glmtune.errors import ConfigError
from glmtune.planning.check import make_plan
from glmtune.planning.published import published_memory
from recipes.plan import COMMAND
from recipes.train import COMMAND as TRAIN
from recipes.words.compose import load_settings

FULL = ("model=chatglm2-6b", "+recipe=full", "hardware=4x80GB")
INT4 = ("model=chatglm2-6b", "+recipe=ptuning", "quantization=int4", "hardware=1x8GB")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("glmtune.models.releases.hub.download", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


def values_of(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict]:
    code = main(["plan", *words, "format=json"])
    return code, json.loads(capsys.readouterr().out)


def test_full_tuning_of_6b_on_four_cards(capsys: pytest.CaptureFixture[str]) -> None:
    code, values = values_of(capsys, *FULL)
    assert (code, values["fits"]) == (3, False)
    assert values["device_bytes"]["weights"] == 4 * 6_243_584_000
    assert values["best"]["changes"] == ["deepspeed=zero2"]
    assert values["best"]["command"] == "glmtune train model=chatglm2-6b +recipe=full deepspeed=zero2"
    assert "4 GPUs" not in values["problem"]
    assert "80.0 GiB" in values["problem"]


def test_ptuning_of_int4_on_8gb(capsys: pytest.CaptureFixture[str]) -> None:
    code, values = values_of(capsys, *INT4)
    assert (code, values["fits"], values["problem"]) == (0, True, "")
    assert 5 * 2**30 < values["device_total_bytes"] < 7 * 2**30  # 6.7 GB were published
    assert values["best"]["command"] == "glmtune train model=chatglm2-6b +recipe=ptuning quantization=int4"
    assert [report["gib"] for report in values["published"]] == [6.7]


def test_preferences_are_planned_as_the_rows_that_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    model = (
        "model=chatglm2-6b",
        "hardware=1x24GB",
        "data.max_source_length=128",
        "data.max_target_length=128",
    )
    rows = "trainer.per_device_train_batch_size"
    lora, dpo, kto = (
        values_of(capsys, *model, "+recipe=lora", *more)[1]["device_bytes"]
        for more in (
            (f"{rows}=4", "data.layout=alpaca"),
            (f"{rows}=2", "preference=dpo", "data=files"),
            (f"{rows}=4", "preference=kto", "data=files"),
        )
    )
    assert dpo == lora == kto
    assert dpo["weights"] < 13 * 2**30  # no second model


@pytest.mark.parametrize("method", ["int8", "int4-g64", "int4-g64-hqq", "nf4", "torchao-int4"])
def test_methods_of_every_origin_are_planned(capsys: pytest.CaptureFixture[str], method: str) -> None:
    _, values = values_of(
        capsys, "model=chatglm2-6b", "+recipe=ptuning", f"quantization={method}", "hardware=1x24GB"
    )
    # Of blocks; embedding and head are 0.5e9 weights of 2 bytes.
    codes = 5.7e9 * (1 if method == "int8" else 0.5)
    assert codes + 1e9 < values["device_bytes"]["weights"] < 1.1 * codes + 1.2e9


def test_the_table_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *FULL]) == 3
    shown = capsys.readouterr().out
    for word in ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "overhead", "host"):
        assert word in shown
    assert "glmtune train model=chatglm2-6b +recipe=full deepspeed=zero2" in shown
    assert "issue" in shown  # a published report


def test_the_command_recommended_is_one_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "model=glm-4-9b",
        "+recipe=full",
        "trainer.per_device_train_batch_size=8",
        "sequence_length=4096",
    )
    _, values = values_of(capsys, *words, "hardware=8x40GB+1000GB")
    command = shlex.split(values["best"]["command"])
    assert command[:2] == ["glmtune", "train"]
    config = load_settings(TRAIN, command[2:])
    plan = make_plan(config, "8x40GB+1000GB", length=4096)
    assert plan.fits
    trainer = config.trainer
    assert trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps == 8 * 16


def test_levers_that_are_not_needed_are_taken_off(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("model=chatglm2-6b", "+recipe=lora", "trainer.gradient_checkpointing=true", "hardware=1x80GB")
    _, values = values_of(capsys, *words)
    assert values["best"]["changes"] == ["trainer.gradient_checkpointing=false"]
    command = "glmtune train model=chatglm2-6b +recipe=lora trainer.gradient_checkpointing=false"
    assert values["best"]["command"] == command


def test_a_quantized_base_comes_last(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("model=chatglm2-6b", "+recipe=ptuning", "hardware=1x8GB")
    code, values = values_of(capsys, *words)
    assert code == 3
    assert "quantization=int4" in values["best"]["changes"]
    assert values["best"]["changes_results"]
    assert "changes what is learnt" in values["problem"]


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, values = values_of(capsys, "model=chatglm2-6b", "+recipe=full", "hardware=1x8GB+16GB")
    assert (code, values["best"]) == (3, None)
    assert "No setting of this method fits" in values["problem"]
    assert "+recipe=lora" in values["problem"]


def test_more_memory_never_hurts_and_longer_rows_need_more() -> None:
    def total(*words: str, length: int | None = None) -> float:
        config = load_settings(COMMAND, ["model=chatglm2-6b", *words])
        return make_plan(config, "1x80GB", length=length).estimate.device.total

    lengths = [total("+recipe=lora", length=length) for length in (256, 1024, 4096, 16384)]
    assert lengths == sorted(lengths)
    assert total("+recipe=lora", "trainer.gradient_checkpointing=true", length=8192) < total(
        "+recipe=lora", length=8192
    )
    sizes = [
        total("+recipe=ptuning", *words) for words in ((), ("quantization=int8",), ("quantization=int4",))
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_probe_times_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("+recipe=ptuning", "model.device=cpu", "data.max_train_samples=64", "probe=true")
    code, values = values_of(capsys, *words)
    assert code == 0
    probe, epoch = values["probe"], values["epoch"]
    assert probe["pass_seconds"] > 0
    assert (epoch["rows"], epoch["steps"]) == (64, 4)
    assert epoch["seconds"] == pytest.approx(4 * probe["step_seconds"])


def test_probe_of_another_machine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "probe=true", "hardware=1x8GB"]) == 2
    assert "the probe measures this machine" in capsys.readouterr().err


def test_wrong_settings_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "hardware=lots"]) == 2
    assert "`hardware` is `lots`" in capsys.readouterr().err
    assert main(["plan", "format=xml"]) == 2
    assert "Valid: table, json" in capsys.readouterr().err
    assert main(["plan", "sequence_length=1"]) == 2
    assert "`sequence_length` is 1" in capsys.readouterr().err


def test_enforce_refuses_a_run_that_cannot_fit(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    words = [
        "train",
        "+recipe=full",
        "plan.enforce=true",
        "plan.hardware=cpu:1GB",
        f"output_dir={tmp_path / 'run'}",
    ]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert "cannot fit" in shown
    assert "1.0 GiB" in shown
    assert "trainer.per_device_train_batch_size=" in shown
    assert not (tmp_path / "run").exists()


def test_without_enforce_a_run_only_warns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    from recipes import train

    started = []
    monkeypatch.setattr(
        train, "run", lambda config: started.append(config) or train.TrainResult(tmp_path, 0, {})
    )
    words = ["train", "+recipe=full", "model.device=cpu", "plan.hardware=cpu:1GB"]
    assert main(words) == 0
    assert len(started) == 1
    assert "may run out of memory" in capsys.readouterr().err


def test_enforce_names_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "model=./nowhere", "plan.enforce=true"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_published_reports_have_sources() -> None:
    reports = published_memory()
    assert len(reports) > 10
    for report in reports:
        assert report.source
        assert report.tune in ("full", "prefix", "lora")
        assert report.quantization in ("none", "int8", "int4")
    with pytest.raises(ConfigError):
        load_settings(COMMAND, ["model=chatglm2-6b", "+recipe=full", "quantization=int4"])


DS_FILE = {
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "none"},
    },
    "train_micro_batch_size_per_gpu": "auto",
}


def ds_file(folder: Path, **zero: object) -> str:
    config = {**DS_FILE, "zero_optimization": {**DS_FILE["zero_optimization"], **zero}}
    (folder / "ds.json").write_text(json.dumps(config))
    return f"deepspeed.config_file={folder / 'ds.json'}"


def test_a_deepspeed_file_counts_instead_of_the_settings_beside_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, values = values_of(capsys, *FULL, "deepspeed=zero2", ds_file(tmp_path))
    sharding = values["workload"]["sharding"]
    assert (sharding["stage"], sharding["offload_optimizer"], sharding["offload_param"]) == (3, True, False)
    assert sharding["bucket_size"] == 4096**2  # what transformers fills in for "auto"
    _, same = values_of(
        capsys, *FULL, "deepspeed=zero3", "deepspeed.offload_optimizer=true", "deepspeed.bucket_size=16777216"
    )
    assert values["device_bytes"] == same["device_bytes"]
    assert (values["host_bytes"], values["notes"]) == (same["host_bytes"], [])
    _, default = values_of(capsys, *FULL, "deepspeed=zero2", ds_file(tmp_path, reduce_bucket_size=12345))
    assert default["workload"]["sharding"]["bucket_size"] == 12345


def test_where_the_file_does_not_fit_another_division_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    word = ds_file(tmp_path, stage=1, offload_optimizer={"device": "none"})
    code, values = values_of(
        capsys, "model=chatglm2-6b", "+recipe=full", "hardware=4x40GB+512GB", "deepspeed=zero1", word
    )
    assert code == 3
    assert values["best"]["changes"][-1].startswith("deepspeed=zero")
    assert "config_file" not in values["best"]["command"]


def test_what_is_not_counted_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    word = ds_file(tmp_path, stage3_max_live_parameters=10, offload_param={"device": "nvme"})
    _, values = values_of(capsys, *FULL, "deepspeed=zero2", word)
    (note,) = values["notes"]
    assert "zero_optimization.stage3_max_live_parameters: 10" in note
    assert 'zero_optimization.offload_param.device: "nvme"' in note
    assert main(["plan", *FULL, "trainer.torch_compile=true"]) == 3
    assert "note: `trainer.torch_compile`: activations are counted as without it" in capsys.readouterr().out
    _, values = values_of(capsys, *FULL)
    assert values["notes"] == []


def test_a_deepspeed_file_that_cannot_be_used_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *FULL, "deepspeed=zero2", "deepspeed.config_file=/nowhere/ds.json"]) == 2
    assert "/nowhere/ds.json" in capsys.readouterr().err


def test_host_memory_follows_how_the_base_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    lora = ("model=chatglm2-6b", "+recipe=lora", "hardware=4x80GB")
    _, parts = values_of(capsys, *lora, "deepspeed=zero3")
    _, whole = values_of(capsys, *lora, "deepspeed=zero2")
    base = 2 * 6_243_584_000
    assert whole["host_bytes"] - parts["host_bytes"] > 4 * base - 2 * 2**30
    assert parts["host_bytes"] < 4 * 2.5 * 2**30 + 2**31
    text = ("+recipe=ptuning", "prefix.init=text", "prefix.init_text=Hello", "deepspeed=zero3")
    _, prefix = values_of(capsys, "model=chatglm2-6b", "hardware=4x80GB", *text)
    assert prefix["host_bytes"] > 4 * base


def test_weights_kept_gathered_count_under_zero3(capsys: pytest.CaptureFixture[str]) -> None:
    lora = ("model=chatglm2-6b", "+recipe=lora", "hardware=4x80GB")
    _, three = values_of(capsys, *lora, "deepspeed=zero3")
    _, two = values_of(capsys, *lora, "deepspeed=zero2")
    assert three["device_bytes"]["buffers"] - two["device_bytes"]["buffers"] == 2 * 10**9  # bfloat16


def test_a_checkpoint_written_beside_training_needs_its_copy(capsys: pytest.CaptureFixture[str]) -> None:
    count, beside = 6_243_584_000, "trainer.async_save=true"
    _, waits = values_of(capsys, *FULL, "deepspeed=zero2")
    _, copies = values_of(capsys, *FULL, "deepspeed=zero2", beside)
    assert copies["host_bytes"] - waits["host_bytes"] == 12 * count  # of all processes on the machine
    assert copies["device_total_bytes"] == waits["device_total_bytes"]
    cpu = ("model=glm-tiny", "+recipe=full", "hardware=cpu:24GB")
    _, waits = values_of(capsys, *cpu)
    _, copies = values_of(capsys, *cpu, beside)
    assert waits["device_bytes"]["snapshot"] == 0
    trained = waits["trained_parameters"]
    assert copies["device_bytes"]["snapshot"] == (12 + 4) * trained  # and of a file while it is written
    assert copies["device_total_bytes"] >= waits["device_total_bytes"] + 12 * trained
