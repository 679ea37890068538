"""The tokenizers of ChatGLM-6B and GLM-4 against the encodings of the released code, real and tiny files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.load import load_tokenizer_folder
from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer

Case = tuple[VocabularyTokenizer, dict[str, Any]]


def load(name: str, oracles: Path, released: Path) -> Case:
    folder = {
        "v1": released / "chatglm-6b",
        "tiny_v1": oracles / "tokenizers" / "tiny_v1",
        "tiny_glm4": oracles / "tokenizers" / "tiny_glm4",
    }[name]
    expected = json.loads((oracles / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))
    return load_tokenizer_folder(folder, Family.GLM4 if name == "tiny_glm4" else Family.CHATGLM), expected


@pytest.fixture(scope="module", params=["v1", "tiny_v1", "tiny_glm4"])
def case(request: pytest.FixtureRequest, oracles: Path, released_tokenizers: Path) -> Case:
    return load(request.param, oracles, released_tokenizers)


@pytest.fixture(scope="module", params=["v1", "tiny_v1"])
def first(request: pytest.FixtureRequest, oracles: Path, released_tokenizers: Path) -> Case:
    return load(request.param, oracles, released_tokenizers)


@pytest.fixture(scope="module")
def glm4(oracles: Path, released_tokenizers: Path) -> Case:
    return load("tiny_glm4", oracles, released_tokenizers)


def test_every_string(case: Case) -> None:
    tokenizer, expected = case
    assert expected["strings"]
    for item in expected["strings"]:
        text, ids, special = item["text"], item["ids"], item["ids_with_special"]
        pieces = tokenizer.tokenize(text)
        assert [list(piece) if isinstance(piece, bytes) else piece for piece in pieces] == item["pieces"]
        assert tokenizer.convert_tokens_to_ids(pieces) == ids
        assert tokenizer.convert_ids_to_tokens(ids) == pieces
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text) == tokenizer(text)["input_ids"] == special
        assert tokenizer.decode(ids) == item["decoded"]
        assert tokenizer.decode(special) == item["decoded_with_special"]
        assert tokenizer.decode(special, skip_special_tokens=True) == item["decoded_with_special_skipped"]
    assert tokenizer.batch_decode([item["ids"] for item in expected["strings"]]) == [
        item["decoded"] for item in expected["strings"]
    ]


def test_special_ids_of_chatglm(first: Case) -> None:
    tokenizer, expected = first
    special = expected["special"]
    assert tokenizer.all_special_tokens == special["all_special_tokens"]
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (special["bos"], special["pad"])
    assert tokenizer.eos_token_id == tokenizer.end_id == special["eos"]
    assert (tokenizer.unk_token_id, tokenizer.mask_token_id) == (special["unk"], special["mask"])
    assert (tokenizer.get_command("[gMASK]"), tokenizer.get_command("</s>")) == (
        special["gmask"],
        special["end"],
    )
    assert (tokenizer.vocab_size, len(tokenizer)) == (special["vocab_size"], special["len"])
    assert tokenizer.suffix_ids == [special["gmask"], special["bos"]]
    vocab = tokenizer.get_vocab()
    assert expected["ids_of"]
    for token, index in expected["ids_of"].items():
        assert tokenizer.convert_tokens_to_ids(token) == tokenizer.get_command(token) == vocab[token] == index
        assert tokenizer.convert_ids_to_tokens(index) == token


def test_special_ids_of_glm4(glm4: Case) -> None:
    tokenizer, expected = glm4
    special = dict(expected["special"])
    assert (tokenizer.vocab_size, len(tokenizer)) == (special.pop("vocab_size"), special.pop("len"))
    assert len(tokenizer.get_vocab()) == len(tokenizer)
    assert tokenizer.eos_token_id == tokenizer.end_id == special.pop("eos")
    assert tokenizer.pad_token_id == special.pop("pad")
    for token, index in special.items():
        assert tokenizer.get_command(token) == tokenizer.convert_tokens_to_ids(token) == index
        assert tokenizer.convert_ids_to_tokens(index) == token
    assert tokenizer.prefix_ids == [special["[gMASK]"], special["<sop>"]]


@pytest.mark.parametrize("field", ["batch_padded", "batch_max_length", "single"])
def test_batches_of_chatglm(first: Case, field: str) -> None:
    tokenizer, expected = first
    batch = expected[field]
    plain = tokenizer(batch["texts"], **batch["kwargs"])
    rows = [list(map(int, row)) for row in plain["input_ids"]]
    assert rows == batch["input_ids"]
    assert [list(row) for row in plain["attention_mask"]] == [
        [int(index != 3) for index in row] for row in rows
    ]
    assert set(plain) == {"input_ids", "attention_mask"}
    tokenizer.prefix_lm_mask = True
    try:
        tensors = tokenizer(batch["texts"], **{**batch["kwargs"], "return_tensors": "pt"})
    finally:
        tokenizer.prefix_lm_mask = False
    assert {name: list(value.shape) for name, value in tensors.items()} == batch["shapes"]
    for name, value in tensors.items():
        assert value.long().tolist() == batch[name]
        assert value.dtype == (torch.bool if name == "attention_mask" else torch.long)


def test_batches_of_glm4(glm4: Case) -> None:
    tokenizer, expected = glm4
    batch = expected["batch_padded"]
    tensors = tokenizer(batch["texts"], return_tensors="pt", **batch["kwargs"])
    assert {name: value.tolist() for name, value in tensors.items()} == {
        name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")
    }


def test_pairs(case: Case) -> None:
    """GLM-4's release has no end token for a pair; its record holds the first text alone."""
    tokenizer, expected = case
    pair = expected["pair"]
    joined = tokenizer.encode(pair["a"], pair["b"])
    if tokenizer.family == Family.GLM4:
        assert tokenizer.encode(pair["a"]) == pair["ids"]
        assert joined == [*pair["ids"], *tokenizer.text_ids(pair["b"]), tokenizer.end_id]
    else:
        assert joined == pair["ids"]


@pytest.mark.parametrize("history", ["without_history", "with_history"])
def test_rows_of_the_official_script(first: Case, history: str) -> None:
    """Evaluation rows are what truncation and padding of the tokenizer make; training rows are cut by hand.

    With a history column the training script numbers rounds even where a row has no history, the evaluation
    and the chat do not.
    """
    tokenizer, expected = first
    case = expected["finetune"]
    source, target = case["max_source_length"], case["max_target_length"]
    prompts = official_prompts(case, history)
    queries, answers = case["examples"]["content"][:3], case["examples"]["summary"][:3]
    train, evaluation = case[history]["train"], case[history]["eval"]
    for prompt, answer, ids, labels in zip(
        prompts, answers, train["input_ids"], train["labels"], strict=True
    ):
        context = tokenizer.encode(prompt, add_special_tokens=False)[: source - 1]
        learnt = tokenizer.encode(answer, add_special_tokens=False)[: target - 2]
        row = tokenizer.build_inputs_with_special_tokens(context, learnt)
        assert [*row, *[3] * (source + target - len(row))] == ids
        start = len(context) + 1
        assert [*[-100] * start, *row[start:], *[-100] * (source + target - len(row))] == labels
    bare = [prompt if "Round 1" in prompt else text for prompt, text in zip(prompts, queries, strict=True)]
    tokenizer.prefix_lm_mask = True
    try:
        tensors = tokenizer(bare, truncation=True, max_length=source, padding=True, return_tensors="pt")
    finally:
        tokenizer.prefix_lm_mask = False
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert tensors[name].long().tolist() == evaluation[name]
    assert tokenizer(answers, truncation=True, max_length=target)["input_ids"] == evaluation["labels"]


def official_prompts(case: dict[str, Any], history: str) -> list[str]:
    prompts = []
    for query, turns in zip(case["examples"]["content"], case["examples"]["history"], strict=True):
        if not query:
            continue
        if history == "without_history":
            prompts.append(query)
            continue
        rounds = [f"[Round {number}]\n问：{q}\n答：{a}\n" for number, (q, a) in enumerate(turns)]
        prompts.append("".join(rounds) + f"[Round {len(turns)}]\n问：{query}\n答：")
    return prompts


def test_saved_and_read_again(case: Case, tmp_path: Path) -> None:
    tokenizer, expected = case
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config.pop("glmtune_family") == tokenizer.family
    if "tokenizer_config" in expected:
        official = {
            key: value for key, value in expected["tokenizer_config"].items() if key != "name_or_path"
        }
        assert config == official
    else:
        assert config["tokenizer_class"] == "ChatGLM4Tokenizer"
        assert {
            entry["content"]: int(index) for index, entry in config["added_tokens_decoder"].items()
        }.items() <= (expected["special"].items())
    again = load_tokenizer_folder(tmp_path, tokenizer.family)
    assert (tmp_path / expected["file"]).read_bytes() == tokenizer._content
    assert len(again) == len(tokenizer)
    texts = [item["text"] for item in expected["strings"]]
    assert again(texts, padding=True)["input_ids"] == tokenizer(texts, padding=True)["input_ids"]
