from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmtune.errors import CheckpointError
from glmtune.models.checkpoints.shards import read_records
from glmtune.models.checkpoints.writing import save_official
from glmtune.models.describe import describe
from glmtune.models.load import load_official
from glmtune.storage.files import write_atomically
from tests.models.checkpoints.stored import read_tensor

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "models"
EMBEDDING = "transformer.embedding.word_embeddings.weight"
NORM = "transformer.encoder.final_layernorm.weight"


def stored(folder: Path) -> dict[str, Tensor]:
    records = read_records(folder)
    return {name: read_tensor(record) for name, record in records.items() if "inv_freq" not in name}


def rewrite(
    source: Path, target: Path, change: Callable[[dict[str, Tensor]], object], kind: str = "bin"
) -> Path:
    """Copy a checkpoint into one file after changing its tensors."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = stored(source)
    change(tensors)
    if kind == "bin":
        torch.save(tensors, target / "pytorch_model.bin")
    else:
        save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize("name", ["chatglm2", "chatglm2-32k", "chatglm3", "glm4", "per-head"])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 6000])
def test_saving_gives_back_every_bit(name: str, max_shard_bytes: int, tmp_path: Path) -> None:
    before = stored(GOLDEN / name)
    model = load_official(GOLDEN / name, dtype=next(iter(before.values())).dtype, device="cpu")
    written = save_official(model, tmp_path, max_shard_bytes=max_shard_bytes)
    after = stored(tmp_path)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value)
    assert sorted(written) == sorted(tmp_path.iterdir())
    assert (len(written) > 2) == (max_shard_bytes == 6000)
    again = load_official(tmp_path, dtype=torch.float32, device="cpu")
    assert again.family == model.family
    assert again.fingerprint() == model.fingerprint()


def test_oracle_checkpoints_come_back_bit_equal_from_every_form(oracles: Path, tmp_path: Path) -> None:
    for form in ("checkpoint_bin", "checkpoint_bin_sharded", "checkpoint_safetensors"):
        before = stored(oracles / "v2" / form)
        save_official(load_official(oracles / "v2" / form, dtype=torch.float16), tmp_path / form)
        after = stored(tmp_path / form)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_save_pretrained_writes_the_official_layout(tmp_path: Path) -> None:
    model = load_official(GOLDEN / "glm4", dtype="float32", device="cpu")
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"
    again = load_official(tmp_path, device="cpu")
    assert again.dtype == torch.float32
    assert again.generation_config.eos_token_id == [40, 41, 42]
    half = {name: value.half() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=half)
    assert stored(tmp_path)[NORM].dtype == torch.float16


def test_a_state_dictionary_in_official_names_can_be_loaded(tmp_path: Path) -> None:
    model = load_official(GOLDEN / "chatglm2", dtype="float32", device="cpu")
    other = load_official(GOLDEN / "chatglm2", dtype="float32", device="cpu")
    torch.nn.init.zeros_(other.lm_head.weight)
    model.save_pretrained(tmp_path)
    assert not other.load_state_dict(load_file(tmp_path / "model.safetensors")).missing_keys
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_a_trainer_saves_and_resumes_official_checkpoints(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 4
    common = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "report_to": "none",
    }
    common |= {
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "learning_rate": 1e-2,
        "seed": 1,
    }
    whole = load_official(GOLDEN / "chatglm2", dtype="float32", device="cpu")
    Trainer(whole, TrainingArguments(**common, max_steps=2), train_dataset=rows).train()
    saved = load_official(tmp_path / "checkpoint-2", device="cpu")
    assert torch.equal(saved.lm_head.weight, whole.lm_head.weight)
    resumed = load_official(GOLDEN / "chatglm2", dtype="float32", device="cpu")
    trainer = Trainer(resumed, TrainingArguments(**common, max_steps=2), train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(resumed.lm_head.weight, whole.lm_head.weight)


def test_a_dtype_can_be_asked_for(tmp_path: Path) -> None:
    model = load_official(GOLDEN / "chatglm2", dtype="float32", device="cpu")
    save_official(model, tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in stored(tmp_path).values()} == {torch.bfloat16}


def test_a_second_save_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    model = load_official(GOLDEN / "chatglm2", dtype="float16", device="cpu")
    save_official(model, tmp_path, max_shard_bytes=4000)
    (tmp_path / "tokenizer.model").touch()
    save_official(model, tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.model"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_saving_an_incomplete_state_names_what_is_missing(tmp_path: Path) -> None:
    model = load_official(GOLDEN / "chatglm2", dtype="float16", device="cpu")
    state = {name: value for name, value in model.state_dict().items() if name != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"1 tensors are missing: model\.norm\.weight"):
        save_official(model, tmp_path, state_dict=state)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_missing_leftover_and_misshapen_tensors_are_all_named(kind: str, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[NORM]
        tensors["classifier_head.weight"] = torch.zeros(2)
        tensors[EMBEDDING] = tensors[EMBEDDING][:40].clone()

    folder = rewrite(GOLDEN / "chatglm2", tmp_path / "changed", change, kind)
    with pytest.raises(CheckpointError) as error:
        load_official(folder)
    text, name = str(error.value), "pytorch_model.bin" if kind == "bin" else "model.safetensors"
    assert str(folder) in text
    assert f"classifier_head.weight in {name}" in text
    assert f"1 missing: {NORM} (looked in {name})" in text
    assert "1 leftover" in text
    assert "classifier_head.weight" in text
    assert f"{EMBEDDING} is [40, 24] in {name}, but config.json asks for [48, 24]" in text


def test_a_prefix_inside_is_pointed_out(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.prefix_encoder.embedding.weight"] = torch.zeros(2)

    with pytest.raises(CheckpointError, match="a tuned prefix: load the base model"):
        load_official(rewrite(GOLDEN / "chatglm2", tmp_path / "changed", change))


def test_codes_in_place_of_weights_are_refused(tmp_path: Path) -> None:
    name = "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int8)

    with pytest.raises(
        CheckpointError,
        match=r"1 hold integer codes.*dense_4h_to_h.weight \(torch.int8 in pytorch_model.bin\)",
    ):
        load_official(rewrite(GOLDEN / "chatglm2", tmp_path / "changed", change))


def test_views_and_transposed_tensors_in_a_pickle_are_read_right(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.output_layer.weight"] = (
            tensors["transformer.output_layer.weight"].t().contiguous().t()
        )
        both = torch.stack((tensors[NORM], tensors[NORM] + 1))
        tensors[NORM] = both[0]
        name = "transformer.encoder.layers.0.input_layernorm.weight"
        tensors[name] = both[1]

    model = load_official(rewrite(GOLDEN / "chatglm2", tmp_path / "changed", change), dtype="float16")
    plain = load_official(GOLDEN / "chatglm2", dtype="float16")
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(model.model.norm.weight, plain.model.norm.weight)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, plain.model.norm.weight + 1)


def test_missing_files(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(GOLDEN / "chatglm2", folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 2 files, but 1 .*: model-00002-of-00002.safetensors"):
        load_official(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is no valid index"):
        load_official(folder)
    for outside in ("../other/model.safetensors", "/etc/passwd", 7):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: outside}}))
        with pytest.raises(
            CheckpointError, match=rf"index\.json: tensor {NORM} is said to be in .*same folder"
        ):
            load_official(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"shards of 2 files, but 1 .*: model-00002-of-00002.safetensors"
    ):
        load_official(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds no weights: expected model\.safetensors, pytorch_model\.bin"
    ):
        load_official(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(GOLDEN / "chatglm2", folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "extra.safetensors")
    content["weight_map"]["more"] = "extra.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"is in model-00001-of-00002.safetensors and in extra.safetensors"
    ):
        load_official(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "pytorch_model.bin",
            b"version https://git-lfs.github.com/spec/v1\n",
            r"git-lfs pointer \(43 bytes\)",
        ),
        ("pytorch_model.bin", b"\x80\x02legacy", "no zip-based PyTorch file"),
        ("pytorch_model.bin", b"PK\x03\x04cut", "cannot be read as a file of PyTorch"),
        ("model.safetensors", b"\xff\xff\xff\x00\x00\x00\x00\x00{", "no complete safetensors file"),
        ("model.safetensors", b"abc", "no complete safetensors file"),
    ],
)
def test_damaged_files(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_records(tmp_path)


def test_truncated_safetensors(tmp_path: Path) -> None:
    whole = (GOLDEN / "chatglm2" / "model-00001-of-00002.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors is no complete safetensors file \(transformer\..* ends at byte",
    ):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ([1], "no complete safetensors file"),
        ({"norm": 7}, "no complete safetensors file"),
        (
            {"norm": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}},
            "tensor norm is stored as F8_E4M3",
        ),
        (
            {"norm": {"dtype": "I8", "shape": [4], "data_offsets": [-4, 0]}},
            r"'norm' of shape '?\[4\]'? takes bytes -4",
        ),
        (
            {"norm": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}},
            r"'norm' of shape \[4\] takes bytes 0",
        ),
    ],
)
def test_headers_of_safetensors_that_make_no_sense(header: object, words: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CheckpointError, match=words):
        read_records(tmp_path)


def test_a_file_cut_between_header_and_reading(tmp_path: Path) -> None:
    folder = rewrite(GOLDEN / "chatglm2", tmp_path / "copy", lambda tensors: None)
    records = read_records(folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="ends inside tensor"):
        read_tensor(records[NORM])


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("content", [{"weight": Harmful()}, {"weight": "text"}, [torch.zeros(1)]])
def test_pickles_with_anything_but_tensors_are_refused(
    content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"plain state dictionary|must be a tensor|a state dictionary is needed"
    ):
        read_records(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("generation", ["v1", "v2"])
@pytest.mark.parametrize("form", ["checkpoint_bin", "checkpoint_bin_sharded", "checkpoint_safetensors"])
@pytest.mark.parametrize("kept", [0.3, 0.99])
def test_a_download_that_stopped_names_its_file(
    generation: str, form: str, kept: float, oracles: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(oracles / generation / form, folder)
    file = max(
        (f for f in folder.iterdir() if f.suffix in (".bin", ".safetensors")), key=lambda f: f.stat().st_size
    )
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    with pytest.raises(CheckpointError, match=rf"{file.name} (cannot be read|is no complete).*incomplete"):
        load_official(folder)


@pytest.mark.parametrize("generation", ["v1", "v2"])
def test_a_shard_that_the_index_forgot(generation: str, oracles: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(oracles / generation / "checkpoint_safetensors", folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    forgotten = weight_map[next(name for name in weight_map if "layers.1.mlp" in name)]
    lost = [name for name, file in weight_map.items() if file == forgotten and "rotary" not in name]
    lost = [name for name in lost if name != "lm_head.weight"]  # the tied head of v1 is never needed
    kept = {name: file for name, file in weight_map.items() if file != forgotten}
    index.write_text(json.dumps({"weight_map": kept}))
    with pytest.raises(CheckpointError) as error:
        load_official(folder)
    assert str(folder) in str(error.value)
    assert f"{len(lost)} missing" in str(error.value)
    assert next(name for name in lost if "layers.1.mlp" in name) in str(error.value)


def test_a_first_generation_checkpoint_with_every_fault_at_once(oracles: Path, tmp_path: Path) -> None:
    norm = "transformer.final_layernorm.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[norm]
        tensors["transformer.more.weight"] = torch.zeros(2)
        tensors["transformer.word_embeddings.weight"] = torch.zeros(4, 4)

    with pytest.raises(CheckpointError) as error:
        load_official(rewrite(oracles / "v1" / "checkpoint_bin", tmp_path / "changed", change))
    for words in (
        f"1 missing: {norm}",
        "transformer.more.weight in pytorch_model.bin",
        "word_embeddings.weight is [4, 4]",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("num_layers", "28", "a whole number from 1 to 10000"),
        ("hidden_size", 0, "a whole number from 1 to 16777216"),
        ("num_attention_heads", None, "a whole number from 1 to 16777216"),
        ("layernorm_epsilon", "small", "a number above 0"),
        ("rope_ratio", -1, "a number above 0"),
        ("eos_token_id", [], "a token id"),
        ("pad_token_id", "x", "a token id"),
        ("add_qkv_bias", "yes", "true or false"),
    ],
)
def test_a_value_that_no_release_could_have(key: str, value: object, rule: str, tmp_path: Path) -> None:
    folder = rewrite(GOLDEN / "chatglm2", tmp_path / "changed", lambda tensors: None)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {key: value}))
    words = re.escape(f"{folder}/config.json cannot be used:\n- {key} is {value!r}, but must be {rule}")
    for read in (load_official, describe):
        with pytest.raises(CheckpointError, match=words):
            read(folder)


@pytest.mark.parametrize("config", [{"model_type": "chatglm", "hidden_size": 8}, {"model_type": "no_such"}])
def test_a_config_of_an_unknown_generation(config: dict[str, object], tmp_path: Path) -> None:
    folder = rewrite(GOLDEN / "chatglm2", tmp_path / "changed", lambda tensors: None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError,
        match=r"changed/config\.json is no official GLM configuration.*inner_hidden_size.*padded_vocab_size",
    ):
        load_official(folder)


@pytest.mark.parametrize("layers", [32, 10**6])
def test_a_config_of_another_architecture_gets_no_memory(layers: int, tmp_path: Path) -> None:
    """Seven billion numbers, or a million blocks, and no weights for them."""
    folder = rewrite(GOLDEN / "chatglm2", tmp_path / "changed", lambda tensors: None)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers}))
    with pytest.raises(
        CheckpointError, match=r"asks for .* numbers \(\d+ layers\), but the weight files hold"
    ):
        load_official(folder)


def test_a_key_of_another_generation_is_named(tmp_path: Path) -> None:
    folder = rewrite(GOLDEN / "chatglm2", tmp_path / "changed", lambda tensors: None)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"partial_moe_experts": 8}))
    with pytest.raises(
        CheckpointError,
        match=r"changed/config\.json cannot be used:\n- unknown keys: partial_moe_experts = 8",
    ):
        load_official(folder)
