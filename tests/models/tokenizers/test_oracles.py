"""The tokenizers against the encodings of the released code, with the real and the tiny files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from glmtune.models.releases.families import Family
from glmtune.models.templates.renderer import render_prompt, template_for
from glmtune.models.tokenizers.base import GlmTokenizer
from glmtune.models.tokenizers.load import load_tokenizer_folder

CASES = {
    "v2": (Family.CHATGLM2, "released"),
    "tiny_v2": (Family.CHATGLM2, "tiny"),
    "glm3": (Family.CHATGLM3, "released"),
    "tiny_glm3": (Family.CHATGLM3, "tiny"),
}


def load(name: str, oracles: Path, released_tokenizers: Path) -> tuple[GlmTokenizer, dict[str, Any]]:
    family, files = CASES[name]
    folder = (
        released_tokenizers / "chatglm2-6b" if files == "released" else oracles / "tokenizers" / "tiny_v2"
    )
    expected = json.loads((oracles / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))
    return load_tokenizer_folder(folder, family), expected


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, oracles: Path, released_tokenizers: Path):
    return load(request.param, oracles, released_tokenizers)


@pytest.fixture(scope="module", params=["v2", "tiny_v2"])
def case_v2(request: pytest.FixtureRequest, oracles: Path, released_tokenizers: Path):
    return load(request.param, oracles, released_tokenizers)


def check_string(tokenizer: GlmTokenizer, expected: dict[str, Any]) -> None:
    text, ids, special = expected["text"], expected["ids"], expected["ids_with_special"]
    assert tokenizer.tokenize(text) == expected["pieces"]
    assert tokenizer.convert_tokens_to_ids(expected["pieces"]) == ids
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.encode(text) == special
    assert tokenizer(text)["input_ids"] == special
    assert tokenizer.decode(ids) == expected["decoded"]
    assert tokenizer.decode(special) == expected["decoded_with_special"]
    assert tokenizer.decode(special, skip_special_tokens=True) == expected["decoded_with_special_skipped"]


def test_every_string(case):
    tokenizer, expected = case
    assert expected["strings"]
    for item in expected["strings"]:
        check_string(tokenizer, item)
    assert tokenizer.batch_decode([item["ids"] for item in expected["strings"]]) == [
        item["decoded"] for item in expected["strings"]
    ]


@pytest.mark.parametrize("name", ["glm3", "tiny_glm3"])
def test_role_names_in_text_only_where_asked_for(name, oracles, released_tokenizers):
    tokenizer, expected = load(name, oracles, released_tokenizers)
    tokenizer.encode_special_tokens = True
    assert expected["strings_encoding_role_tokens"]
    for item in expected["strings_encoding_role_tokens"]:
        check_string(tokenizer, item)


def test_special_ids_and_sizes(case):
    tokenizer, expected = case
    special = dict(expected["special"])
    assert tokenizer.eos_token_id == tokenizer.end_id == special.pop("eos")
    assert tokenizer.pad_token_id == special.pop("pad")
    assert tokenizer.vocab_size == special.pop("vocab_size")
    assert len(tokenizer) == len(tokenizer.get_vocab()) == special.pop("len")
    assert tokenizer.sp_model.bos_id() == special.pop("bos_piece", 1)
    assert tokenizer.bos_token_id is None
    for token, index in special.items():
        assert tokenizer.get_command(token) == tokenizer.convert_tokens_to_ids(token) == index


def test_id_to_token(case):
    tokenizer, expected = case
    assert expected["id_to_token"]
    for index, token in expected["id_to_token"].items():
        assert tokenizer.convert_ids_to_tokens(int(index)) == token
        assert tokenizer.convert_ids_to_tokens([int(index)]) == [token]


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, "batch_padded") for name in CASES]
    + [(name, field) for name in ("v2", "tiny_v2") for field in ("single", "batch_max_length")],
)
def test_batches(name, field, oracles, released_tokenizers):
    tokenizer, expected = load(name, oracles, released_tokenizers)
    batch = expected[field]
    rows = tokenizer(batch["texts"], **batch["kwargs"])
    assert set(rows) == {"input_ids", "attention_mask", "position_ids"}
    tensors = tokenizer(batch["texts"], return_tensors="pt", **batch["kwargs"])
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert rows[name] == batch[name]
        assert tensors[name].tolist() == batch[name]
        assert list(tensors[name].shape) == batch["shapes"][name]


def test_pair(case_v2):
    tokenizer, expected = case_v2
    pair = expected["pair"]
    assert tokenizer.encode(pair["a"], pair["b"]) == pair["ids"]
    assert tokenizer([pair["a"]], [pair["b"]])["input_ids"] == [pair["ids"]]


def test_decoding_while_bytes_are_incomplete(case_v2):
    tokenizer, expected = case_v2
    assert expected["partial_decode"]
    for item in expected["partial_decode"]:
        assert tokenizer.decode(item["ids"]) == item["decoded"]


@pytest.mark.parametrize("history", ["without_history", "with_history"])
def test_rows_of_the_official_script(case_v2, history):
    """Rows are built as that script does; its cut of the end of a long prompt is the tokenizer's truncation."""
    tokenizer, expected = case_v2
    rows = expected["finetune"]
    source, target = rows["max_source_length"], rows["max_target_length"]
    examples = rows["examples"]
    turns = examples["history"] if history == "with_history" else [()] * len(examples["content"])
    triples = [t for t in zip(examples["content"], turns, examples["summary"], strict=True) if t[0]]
    prompts = [render_prompt(query, [tuple(turn) for turn in earlier]) for query, earlier, _ in triples]
    for prompt, (_, _, answer), ids, labels in zip(
        prompts, triples, rows[history]["train"]["input_ids"], rows[history]["train"]["labels"], strict=True
    ):
        prompt_ids = tokenizer.encode(prompt, truncation=True, max_length=source)
        answer_ids = tokenizer.encode(answer, add_special_tokens=False, truncation=True, max_length=target)
        answer_ids.append(tokenizer.eos_token_id)
        num_padding = source + target + 1 - len(prompt_ids) - len(answer_ids)
        assert prompt_ids + answer_ids + [tokenizer.pad_token_id] * num_padding == ids
        assert [-100] * len(prompt_ids) + answer_ids + [-100] * num_padding == labels
    evaluation = rows[history]["eval"]
    encoded = tokenizer(prompts, truncation=True, max_length=source, padding=True)
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert encoded[name] == evaluation[name]
    answers = [answer for _, _, answer in triples]
    assert tokenizer(answers, truncation=True, max_length=target)["input_ids"] == evaluation["labels"]


def test_stop_ids(case):
    tokenizer, expected = case
    assert list(template_for(tokenizer).stop_ids(tokenizer)) == expected.get("chat_stop_ids", [2])


def test_saved_and_read_again(case, tmp_path):
    tokenizer, expected = case
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config.pop("glmtune_family") == tokenizer.family
    assert config == {
        key: value for key, value in expected["tokenizer_config"].items() if key != "name_or_path"
    }
    again = load_tokenizer_folder(tmp_path, tokenizer.family)
    assert hashlib.sha256((tmp_path / "tokenizer.model").read_bytes()).hexdigest() == expected["sha256"]
    assert expected["strings"]
    for item in expected["strings"]:
        check_string(again, item)
