"""What `load_model` gives ends an answer where the release does, and so does all that is written from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LogitsProcessorList

from glmtune.export.export import export
from glmtune.export.source import ExportJob
from glmtune.inference.predict.generate import generate_ids
from glmtune.inference.settings import GenerationSettings
from glmtune.loading import load_model, load_tokenizer
from glmtune.models.generation import release_generation
from glmtune.models.placeholders import load_placeholders
from glmtune.quantization.files.write import QuantizeJob, quantize_checkpoint
from glmtune.training.adapt import fresh_model

GLM4_CONFIG = SimpleNamespace(
    vocab_size=151552, eos_token_id=[151329, 151336, 151338], pad_token_id=151329, bos_token_id=None,
    max_position_embeddings=1000, glmtune_family="glm4",
)  # fmt: skip
CHATGLM3_CONFIG = SimpleNamespace(
    vocab_size=65024, eos_token_id=2, pad_token_id=0, bos_token_id=1, max_position_embeddings=8192,
    glmtune_family="chatglm3",
)  # fmt: skip
RELEASED = {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "max_length": 128000,
            "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329}  # fmt: skip


def given(folder: Path, values: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_a_release_without_tokenizer_ends_where_its_family_does(tmp_path: Path) -> None:
    found = release_generation(tmp_path, CHATGLM3_CONFIG)
    assert found.eos_token_id == [2, 64795, 64797]
    assert (found.pad_token_id, found.do_sample) == (0, False)
    assert release_generation(tmp_path, GLM4_CONFIG).eos_token_id == [151329, 151336, 151338]
    small = SimpleNamespace(**{**vars(CHATGLM3_CONFIG), "vocab_size": 1000})
    assert release_generation(tmp_path, small).eos_token_id == 2, "ids of another vocabulary say nothing"


def test_the_releases_own_sampling_is_kept(tmp_path: Path) -> None:
    found = release_generation(given(tmp_path, RELEASED), GLM4_CONFIG)
    assert (found.do_sample, found.temperature, found.top_p, found.max_length) == (True, 0.8, 0.8, 1000)
    assert found.eos_token_id == [151329, 151336, 151338]
    found.save_pretrained(str(tmp_path))
    again = release_generation(tmp_path, GLM4_CONFIG)
    assert again.to_dict() == found.to_dict()


def test_greedy_files_with_a_temperature_can_be_written_again(tmp_path: Path) -> None:
    found = release_generation(given(tmp_path, {**RELEASED, "do_sample": False}), GLM4_CONFIG)
    assert (found.do_sample, found.temperature) == (False, None)
    found.save_pretrained(str(tmp_path))


def test_ends_of_the_file_are_added(tmp_path: Path) -> None:
    assert release_generation(given(tmp_path, {"eos_token_id": 7}), CHATGLM3_CONFIG).eos_token_id == [
        2, 7, 64795, 64797,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        {"do_sample": "yes"},
        {"do_sample": True, "temperature": 0},
        {"do_sample": True, "temperature": "hot"},
        {"do_sample": True, "top_p": 2},
        {"do_sample": True, "top_k": -1},
        {"repetition_penalty": -1},
        {"max_length": 10**30},
        {"max_length": 0},
        {"eos_token_id": 70000},
        {"eos_token_id": [2, "x"]},
        {"eos_token_id": []},
        {"pad_token_id": -1},
    ],
)
def test_what_cannot_be_meant_is_told_and_left_out(tmp_path: Path, caplog, values: dict) -> None:
    found = release_generation(given(tmp_path, values), CHATGLM3_CONFIG)
    name = list(values)[-1]
    assert f"generation_config.json: {name} is" in caplog.text
    plain = release_generation(tmp_path / "nowhere", CHATGLM3_CONFIG)
    assert getattr(found, name) == getattr(plain, name)


def test_a_broken_file_does_not_keep_a_model_from_loading(tmp_path: Path, caplog) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    assert release_generation(tmp_path, CHATGLM3_CONFIG).eos_token_id == [2, 64795, 64797]
    assert "sampling is not known" in caplog.text


# ---- of a checkpoint with its tokenizer


@pytest.fixture(scope="module")
def chatglm3(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ChatGLM3 checkpoint whose generation_config.json tells sampling, and one end of three."""
    folder = tmp_path_factory.mktemp("releases") / "chatglm3-tiny"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text()) | {"glmtune_family": "chatglm3"}
    (folder / "config.json").write_text(json.dumps(config))
    return given(folder, {"do_sample": True, "temperature": 0.7, "top_k": 3, "eos_token_id": 2})


@pytest.fixture(scope="module")
def ends(chatglm3: Path) -> list[int]:
    tokenizer = load_tokenizer(chatglm3)
    return [tokenizer.eos_token_id, *map(tokenizer.get_command, ("<|user|>", "<|observation|>"))]


def settings_of(folder: Path) -> dict:
    kept = ("eos_token_id", "do_sample", "temperature", "top_k")
    stored = json.loads((folder / "generation_config.json").read_text())
    return {name: stored.get(name) for name in kept}


def test_generate_without_arguments_ends_where_the_user_speaks(chatglm3: Path, ends: list[int]) -> None:
    model = load_model(chatglm3, device="cpu")
    assert model.generation_config.eos_token_id == ends

    def say_user(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(ends[1]), 0.0)

    found = model.generate(torch.tensor([[3, 5, 8]]), logits_processor=LogitsProcessorList([say_user]))
    assert found[0, 3:].tolist() == [ends[1]]


@pytest.mark.parametrize(
    "way", ["save", "quantize", "official", "transformers", "placeholders", "from_scratch"]
)
def test_all_that_is_written_from_it_ends_alike(
    chatglm3: Path, ends: list[int], tmp_path: Path, way: str
) -> None:
    folder = tmp_path / "out"
    if way == "save":
        load_model(chatglm3).save_pretrained(folder)
    elif way == "quantize":
        quantize_checkpoint(QuantizeJob(source=str(chatglm3), method="int8", output_dir=folder))
    elif way == "placeholders":
        folder.mkdir()
        load_placeholders(chatglm3, dtype="float32").generation_config.save_pretrained(folder)
    elif way == "from_scratch":
        fresh_model(str(chatglm3), device="cpu", family=None).save_pretrained(folder)
    else:
        export(
            ExportJob(
                source=str(chatglm3), format=way, output_dir=folder, family=None, prefix_path=None,
                adapter_path=None, dtype=None, max_shard_bytes=2**30, overwrite=False,
            )
        )  # fmt: skip
    assert settings_of(folder) == {"eos_token_id": ends, "do_sample": True, "temperature": 0.7, "top_k": 3}


def test_chat_and_predict_answer_as_without_the_file(chatglm3: Path, tmp_path: Path) -> None:
    plain = tmp_path / "chatglm3-plain"
    shutil.copytree(chatglm3, plain)
    (plain / "generation_config.json").unlink()
    answers = []
    for folder in (chatglm3, plain):
        model, tokenizer = load_model(folder, device="cpu"), load_tokenizer(folder)
        torch.manual_seed(0)
        sampled = model.chat(tokenizer, "你好", max_new_tokens=12)[0]
        greedy = model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=12)[0]
        settings = GenerationSettings(max_new_tokens=12)
        predicted = list(generate_ids(model, [[3, 5, 8]], settings, stop_ids=[2], pad_id=0))
        answers.append((sampled, greedy, predicted))
    assert answers[0] == answers[1]


def test_a_damaged_tokenizer_does_not_keep_a_model_from_loading(
    chatglm3: Path, tmp_path: Path, caplog
) -> None:
    shutil.copytree(chatglm3, tmp_path / "chatglm3")
    (tmp_path / "chatglm3" / "tokenizer.model").write_bytes(b"no")
    assert load_model(tmp_path / "chatglm3").generation_config.eos_token_id == 2
    assert "taken from config.json alone" in caplog.text
