"""`glmtune quantize`, and every command on what it writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glmtune.cli import main
from glmtune.errors import CheckpointError, ConfigError
from glmtune.loading import load_model, load_tokenizer
from glmtune.models.settings import CheckpointSettings, ModelSettings
from glmtune.quantization.files.write import REPORT_FILE, QuantizeJob, quantize_checkpoint
from glmtune.quantization.settings import QuantizationSettings
from recipes.quantize import QuantizeConfig, run


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def command(*words: object) -> int:
    return main([str(word) for word in words])


def test_the_embedded_model_in_four_bits(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("quantize", "model=glm-tiny", "bits=4") == 0
    shown = capsys.readouterr().out
    folder = Path("runs/quantize-glm-tiny-int4")
    assert "official format" in shown
    assert "query_key_value" in shown
    assert "outside the blocks" in shown
    report = json.loads((folder / REPORT_FILE).read_text())
    assert report["is_official"]
    assert report["method"] == "int4"
    kinds = {kind["kind"]: kind for kind in report["kinds"]}
    assert kinds["dense_4h_to_h"]["num_replaced"] > 0
    assert 10 < kinds["dense_4h_to_h"]["sqnr_db"] < 25
    assert report["num_bytes"] < report["source_bytes"]
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert report["num_bytes"] <= stored <= report["num_bytes"] + 50_000
    assert json.loads((folder / "config.json").read_text())["quantization_bit"] == 4

    assert command("info", folder) == 0
    assert "int4, 4 bits: " in " ".join(capsys.readouterr().out.split())
    rows = ("data.max_train_samples=8", "data.max_eval_samples=4")
    train = (
        "retention=null",
        "trainer.max_steps=2",
        "trainer.save_steps=2",
        "trainer.per_device_train_batch_size=2",
        *rows,
    )
    assert command("train", "+recipe=ptuning", f"model={folder.absolute()}", "output_dir=tuned", *train) == 0
    predict = ("data.max_predict_samples=2", "generation.max_new_tokens=4")
    assert command("predict", f"model={folder.absolute()}", "prefix_path=tuned", *predict) == 0
    assert len(Path("tuned/predict/generated_predictions.jsonl").read_text().splitlines()) == 2
    model, tokenizer = load_model(folder, prefix="tuned"), load_tokenizer(folder)
    assert isinstance(model.chat(tokenizer, "3+5", max_new_tokens=4)[0], str)
    # the tuned prefix belongs to the quantized weights
    with pytest.raises(CheckpointError, match="trained on another base"):
        load_model("glm-tiny", prefix="tuned")
    capsys.readouterr()


def test_int8_embeddings_in_a_folder_of_every_command(
    tiny_base: Path, tiny_rows: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", f"model={tiny_base}", "quantization=int4-g32"]
    assert command(*words, "quantization_embeddings=int8") == 0  # its name in the other commands
    shown = capsys.readouterr()
    assert "glmtune's own format" in shown.out
    folder = next(Path("runs").glob("quantize-*-int4-g32-e8")).absolute()
    assert command(*words, "quantization.embeddings=int8", "output_dir=again") == 0
    assert (Path("again") / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert command("info", folder) == 0
    assert "embeddings: int8" in " ".join(capsys.readouterr().out.split())

    rows = [f"data.train_file={tiny_rows['train']}", "data.prompt_column=content", "data=files"]
    rows += [f"data.validation_file={tiny_rows['validation']}", "data.response_column=summary"]
    train = [
        "train",
        "+recipe=ptuning",
        *rows,
        "retention=null",
        "trainer.max_steps=2",
        "trainer.save_steps=2",
    ]
    train += ["trainer.per_device_train_batch_size=2"]
    rounded = [f"model={tiny_base}", "quantization=int4-g32", "quantization_embeddings=int8"]
    assert command(*train, f"model={folder}", "output_dir=tuned") == 0
    assert command(*train, *rounded, "output_dir=tuned-on-loading") == 0
    # The same codes, so the same steps.
    name = "last/prefix_encoder.safetensors"
    assert Path("tuned", name).is_file()
    tensors = [load_file(Path(run, name)) for run in ("tuned", "tuned-on-loading")]
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())
    card = Path("tuned-on-loading/README.md").read_text()
    assert "embedding and head in INT8" in card
    assert 'quantization="int4-g32", quantization_embeddings="int8"' in card

    asked = [f"data.test_file={tiny_rows['validation']}", "data=files", "data.prompt_column=content"]
    asked += ["data.response_column=summary", "generation.max_new_tokens=3", "data.max_predict_samples=2"]
    answers = []
    for number, base in enumerate(([f"model={folder}"], rounded)):
        out = f"out-{number}"
        assert command("predict", *base, "prefix_path=tuned", *asked, f"output_dir={out}") == 0
        answers.append((Path(out) / "generated_predictions.jsonl").read_text())
    assert answers[0] == answers[1]
    # Another head answers otherwise, if by little: the folder is not gone on with.
    plain = ["predict", f"model={tiny_base}", "quantization=int4-g32", "prefix_path=tuned", *asked]
    capsys.readouterr()
    assert command(*plain, "output_dir=out-1") != 0
    assert "quantization_embeddings" in capsys.readouterr().err


def test_lora_over_weights_quantized_on_loading(tiny_base: Path, tiny_rows: dict[str, Path]) -> None:
    words = [
        "train", "+recipe=lora", f"model={tiny_base}", "quantization_bit=8", "output_dir=tuned", "data=files",
        f"data.train_file={tiny_rows['train']}", f"data.validation_file={tiny_rows['validation']}",
        "data.prompt_column=content", "data.response_column=summary",
        "retention=null", "trainer.max_steps=2", "trainer.save_steps=2", "trainer.per_device_train_batch_size=2",
    ]  # fmt: skip
    assert command(*words) == 0
    card = Path("tuned/README.md").read_text()
    assert "quantized to int8" in card
    assert 'quantization="int8"' in card
    data = (f"data.test_file={tiny_rows['validation']}", "data=files", "data.prompt_column=content")
    data += ("data.response_column=summary", "generation.max_new_tokens=3", "data.max_predict_samples=2")
    assert command("predict", f"model={tiny_base}", "quantization=int8", "adapter_path=tuned", *data) == 0
    assert command("predict", f"model={tiny_base}", "adapter_path=tuned", *data, "output_dir=other") != 0


@pytest.mark.parametrize("name", ["v1", "v2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_official_checkpoints_of_both_generations(name: str, bits: int, oracles: Path) -> None:
    source = str(oracles / name / "checkpoint_bin")
    written = run(QuantizeConfig(model=CheckpointSettings(source=source), bits=bits, output_dir="out"))
    assert written.is_official
    official = torch.load(oracles / name / f"int{bits}" / "pytorch_model.bin", weights_only=True)
    found = load_file(written.folder / "model.safetensors")
    for key, value in official.items():
        assert "inv_freq" in key or torch.equal(found[key], value), key
    config = json.loads((written.folder / "config.json").read_text())
    assert config["quantization_bit"] == bits
    assert load_model(written.folder).quantization == f"int{bits}"  # type: ignore[attr-defined]


def test_groups_choose_a_method_and_options_go_through(tiny_base: Path) -> None:
    words = ["quantize", f"model={tiny_base}", "quantization=int4-g64-asym", "output_dir=out"]
    assert command(*words, "quantization.skip=[dense, '*.layers.0.*']", "max_shard_mib=1") == 0
    report = json.loads(Path("out", REPORT_FILE).read_text())
    replaced = [layer["name"] for layer in report["layers"] if layer["replaced"]]
    assert replaced
    assert not any(".layers.0." in name or name.endswith(".dense") for name in replaced)
    assert not report["is_official"]
    assert load_model("out").quantization == "int4-g64-asym"  # type: ignore[attr-defined]


def test_a_calibrated_method_looks_at_training_rows(tiny_base: Path, tiny_rows: dict[str, Path]) -> None:
    data = (f"data.train_file={tiny_rows['train']}", "data.prompt_column=content", "data=files")
    data += ("data.response_column=summary", "num_calibration_rows=6")
    assert command("quantize", f"model={tiny_base}", "quantization=int4-gptq", "output_dir=out", *data) == 0
    report = json.loads(Path("out", REPORT_FILE).read_text())
    assert report["measured"] == "outputs"
    assert report["is_official"]
    assert load_model("out").quantization == "int4-gptq"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="`embeddings` is true, but `int4-gptq`"):
        quantize_checkpoint(QuantizeJob(str(tiny_base), "int4-gptq", Path("x"), embeddings=True))


def test_settings_that_contradict_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"`bits` is 3, but it must be 4 or 8"):
        QuantizeConfig(model=CheckpointSettings(source="glm-tiny"), bits=3)
    with pytest.raises(ConfigError, match=r"`bits` is 8, but `quantization.method` is `int4-g64`, of 4"):
        QuantizeConfig(
            model=CheckpointSettings(source="glm-tiny"),
            bits=8,
            quantization=QuantizationSettings(method="int4-g64"),
        )
    with pytest.raises(ConfigError, match=r"`quantization.embeddings` is `int4`, .*Valid: int8, true, false"):
        QuantizationSettings(embeddings="int4")
    for typed, meant in ((None, False), ("int8", "int8"), ("True", True), ("true", True), ("False", False)):
        assert QuantizationSettings(embeddings=typed).layout_embeddings == meant
    with pytest.raises(ConfigError, match=r"`model.source` is null"):
        QuantizeConfig()
    with pytest.raises(ConfigError, match=r"`model.quantization_bit` is 5, but it must be 4 or 8"):
        ModelSettings(quantization_bit=5)
    with pytest.raises(ConfigError, match="say the same thing twice"):
        ModelSettings(quantization_bit=4, quantization="int8")
    assert command("train", "+recipe=full", "quantization=int4") == 2
    assert "`tune` is `full`, and codes cannot be trained" in capsys.readouterr().err
    assert command("quantize", "quantization=int4-g65") == 2
    assert "Did you mean `int4-g64`" in capsys.readouterr().err


def test_full_tuning_of_a_quantized_folder_is_refused(oracles: Path, tiny_tokenizer) -> None:
    from glmtune.loading import load_base
    from glmtune.training.adapt import tune_all

    model = load_base(oracles / "v2" / "int4", device="cpu")
    with pytest.raises(ConfigError, match=r"`tune` is `full`, but .*int4` is quantized \(int4\)"):
        tune_all(model, tiny_tokenizer)


def test_only_earlier_results_are_replaced(tiny_base: Path, oracles: Path) -> None:
    job = QuantizeJob(str(tiny_base), "int8", Path("out"))
    quantize_checkpoint(job)
    with pytest.raises(ConfigError, match=r"`out`, which holds an earlier quantized model.*overwrite=true"):
        quantize_checkpoint(job)
    again = QuantizeJob(str(tiny_base), "int4", Path("out"), overwrite=True)
    assert quantize_checkpoint(again).report.method == "int4"
    assert not list(Path().glob(".out*"))
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"no quantization_report\.json.*never replaced"):
        quantize_checkpoint(QuantizeJob(str(tiny_base), "int4", Path("mine"), overwrite=True))
    with pytest.raises(ConfigError, match=r"quantized already \(int4\).*unquantized release"):
        quantize_checkpoint(QuantizeJob(str(oracles / "v2" / "int4"), "int4", Path("new")))


def test_what_does_not_read_back_is_not_put_in_place(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmtune.quantization.files import write

    save = write.save_official

    def damaged(model, folder: Path, **options) -> None:
        save(model, folder, **options)
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-8] ^= 1
        file.write_bytes(bytes(content))

    monkeypatch.setattr(write, "save_official", damaged)
    with pytest.raises(CheckpointError, match="reads back otherwise than it was written"):
        quantize_checkpoint(QuantizeJob(str(tiny_base), "int8", Path("out")))
    assert list(Path().iterdir()) == []
    monkeypatch.setattr(write, "save_official", save)
    Path("file").write_text("")
    with pytest.raises(ConfigError, match=r"`output_dir` is `file/below`, but it cannot be written"):
        quantize_checkpoint(QuantizeJob(str(tiny_base), "int8", Path("file/below")))


def test_layers_that_a_kill_left_behind_go_once_their_result_is_there(tiny_base: Path) -> None:
    quantize_checkpoint(QuantizeJob(str(tiny_base), "int8", Path("out")))
    layer = Path(".out.parts") / "layer.safetensors"
    layer.parent.mkdir()
    layer.write_bytes(b"used")
    again = QuantizeJob(str(tiny_base), "int8", Path("out"))
    with pytest.raises(ConfigError, match="earlier quantized model"):
        quantize_checkpoint(again)
    assert layer.is_file(), "younger than the result: of a run that is to replace it"
    os.utime(layer, (1.0, 1.0))
    with pytest.raises(ConfigError, match="earlier quantized model"):
        quantize_checkpoint(again)
    assert not layer.parent.exists()
