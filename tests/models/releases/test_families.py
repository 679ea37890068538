from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.releases.families import Family, detect_family, family_of_name, parse_family

LATER = {"ffn_hidden_size": 80, "kv_channels": 16, "padded_vocab_size": 176, "multi_query_group_num": 2}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("THUDM/chatglm2-6b", Family.CHATGLM2),
        ("chatglm2-6b-int4", Family.CHATGLM2),
        ("zai-org/chatglm2-6b-32k", Family.CHATGLM2_32K),
        ("codegeex2-6b", Family.CODEGEEX2),
        ("chatglm3-6b-base", Family.CHATGLM3),
        ("ChatGLM3-6B-128K", Family.CHATGLM3_32K),
        ("glm-4-9b-chat-1m", Family.GLM4),
        ("my-glm4", Family.GLM4),
        ("chatglm-6b", None),
        ("checkpoint-3000", None),
    ],
)
def test_a_name_tells_the_family(name: str, family: Family | None) -> None:
    assert family_of_name(name) == family


def test_every_oracle_config_is_recognised(oracles: Path) -> None:
    expected = {
        "v1/checkpoint_bin": Family.CHATGLM,
        "v1_l28/checkpoint_safetensors": Family.CHATGLM,
        "v2/checkpoint_bin": Family.CHATGLM2,
        "v2/int4": Family.CHATGLM2,
        "v2_32k/checkpoint_bin": Family.CHATGLM2_32K,
        "glm3/checkpoint_bin": Family.CHATGLM3,
        "glm3_32k/checkpoint_safetensors": Family.CHATGLM3_32K,
        "glm4/checkpoint_bin": Family.GLM4,
    }
    for name, family in expected.items():
        config = json.loads((oracles / name / "config.json").read_text())
        assert detect_family(oracles / name, config) == family


def test_the_folder_name_helps_where_the_config_has_none(tmp_path: Path) -> None:
    assert detect_family(tmp_path / "chatglm3-6b", LATER) == Family.CHATGLM3
    hub = tmp_path / "models--zai-org--codegeex2-6b" / "snapshots" / "0a1b"
    assert detect_family(hub, LATER) == Family.CODEGEEX2


def test_the_tokenizer_config_helps(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added": ["<|assistant|>"]}))
    assert detect_family(tmp_path, LATER) == Family.CHATGLM3
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "/data/codegeex2-6b"}))
    assert detect_family(tmp_path, LATER) == Family.CODEGEEX2


def test_our_own_key_wins(tmp_path: Path) -> None:
    config = LATER | {"_name_or_path": "THUDM/chatglm2-6b"}
    assert detect_family(tmp_path, config | {"glmtune_family": "chatglm3"}) == Family.CHATGLM3
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"glmtune_family": "codegeex2"}))
    assert detect_family(tmp_path, config) == Family.CODEGEEX2


def test_a_list_of_end_ids_means_glm4(tmp_path: Path) -> None:
    assert detect_family(tmp_path, LATER | {"eos_token_id": [1, 2], "rope_ratio": 500}) == Family.GLM4


def test_a_stretched_rotary_table_adds_32k(tmp_path: Path) -> None:
    config = LATER | {"_name_or_path": "THUDM/chatglm3-6b", "rope_ratio": 50}
    assert detect_family(tmp_path, config) == Family.CHATGLM3_32K


def test_an_undecidable_rotary_rule_asks_for_the_family(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"rope_ratio 16.*names point at: nothing.*family=.*chatglm2-32k"
    ):
        detect_family(tmp_path / "run", LATER | {"rope_ratio": 16})
    config = LATER | {"rope_ratio": 16, "_name_or_path": "THUDM/chatglm2-6b"}
    with pytest.raises(CheckpointError, match=r"chatglm2, chatglm3"):
        detect_family(tmp_path / "chatglm3-6b", config)


def test_no_name_at_all_is_said_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert detect_family(tmp_path / "run", LATER) == Family.CHATGLM2
    assert "Pass family=" in caplog.text


def test_another_architecture_has_the_files_of_transformers(tmp_path: Path) -> None:
    assert detect_family(tmp_path, {"model_type": "llama", "hidden_size": 4}) is Family.TRANSFORMERS
    with pytest.raises(CheckpointError, match=r"no official GLM configuration: model_type is 'no_such'"):
        detect_family(tmp_path, {"model_type": "no_such", "hidden_size": 4})


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_the_format_of_transformers(model_type: str, tmp_path: Path) -> None:
    values = {"model_type": model_type, "hidden_size": 8}
    assert detect_family(tmp_path, values) is Family.TRANSFORMERS
    assert detect_family(tmp_path, values | {"glmtune_family": "chatglm2"}) is Family.CHATGLM2  # our export


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("GLM-4-9B-0414", Family.TRANSFORMERS),
        ("GLM-4-32B-Base-0414", Family.TRANSFORMERS),
        ("GLM-Z1-Rumination-32B-0414", Family.TRANSFORMERS),
        ("glm-edge-4b-chat", Family.TRANSFORMERS),
        ("glm-4-9b-chat-1m-hf", Family.TRANSFORMERS),
        ("glm-4-9b-chat-1m", Family.GLM4),
    ],
)
def test_names_of_releases_in_the_format_of_transformers(name: str, family: Family) -> None:
    assert family_of_name(name) is family


def test_damaged_tokenizer_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json is no valid JSON"):
        detect_family(tmp_path, LATER)


def test_unknown_family_names_the_nearest() -> None:
    assert parse_family("glm4") is Family.GLM4
    with pytest.raises(ConfigError, match=r"`model.family` is `chatglm2-32`.*Did you mean `chatglm2-32k`"):
        parse_family("chatglm2-32")
