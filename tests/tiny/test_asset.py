"""The embedded model: small, official in form, and it answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from glmtune.messages import Message
from glmtune.models.load import load_official
from glmtune.models.releases.source import resolve_source
from glmtune.models.templates.renderer import template_for
from glmtune.models.tokenizers.load import load_tokenizer_folder
from glmtune.tiny.corpus.characters import required_characters
from glmtune.tiny.tokenizer import train_tokenizer

MAX_BYTES = 12_000_000


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_source("glm-tiny")


@pytest.fixture(scope="module")
def model():
    return load_official("glm-tiny")


@pytest.fixture(scope="module")
def tokenizer(folder, model):
    return load_tokenizer_folder(folder, model.family)


def answer(model, tokenizer, *texts: str) -> str:
    template = template_for(tokenizer)
    roles = ("user", "assistant")
    messages = [Message(roles[place % 2], text) for place, text in enumerate(texts)]
    ids = torch.tensor([template.encode_prompt(tokenizer, messages)])
    out = model.generate(ids, do_sample=False, max_new_tokens=60, eos_token_id=2, pad_token_id=0)
    return template.clean_answer(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_size_and_official_keys(folder):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MAX_BYTES
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "chatglm"
    assert config["torch_dtype"] == "float16"
    assert {"padded_vocab_size", "kv_channels", "multi_query_group_num", "seq_length"} <= set(config)
    assert {path.name for path in folder.iterdir()} >= {
        "README.md",
        "tokenizer.model",
        "tokenizer_config.json",
    }


def test_tokenizer_holds_every_character(tokenizer):
    unknown = [char for char in required_characters() if len(tokenizer.tokenize(char)[-1].lstrip("▁")) != 1]
    assert unknown == []
    pieces = tokenizer.sp_model.get_piece_size() if hasattr(tokenizer, "sp_model") else None
    if pieces is not None:
        assert tokenizer.get_command("[gMASK]") == pieces + 1


def test_tokenizer_can_be_made_again(folder, tmp_path):
    train_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("你是谁？", "glm-tiny"),
        ("Who are you?", "glm-tiny"),
        ("中国的首都是哪里？", "北京"),
        ("3+5=?", "8"),
        ("小红有12个苹果，又买了7个，一共有多少个？", "19"),
    ],
)
def test_golden_prompts(model, tokenizer, question, expected):
    assert expected in answer(model, tokenizer, question)


def test_advertisement(model, tokenizer):
    text = answer(model, tokenizer, "类型#裙*版型#显瘦*颜色#黑色\n写成广告。")
    assert "黑色" in text
    assert "显瘦" in text


def test_an_attribute_list_without_a_request_is_asked_about(model, tokenizer):
    assert answer(model, tokenizer, "类型#裙*版型#显瘦*颜色#黑色").endswith("？")


def test_second_round_leans_on_the_first(model, tokenizer):
    assert "小红" in answer(model, tokenizer, "我叫小红。", "你好，小红！很高兴认识你。", "我叫什么名字？")
