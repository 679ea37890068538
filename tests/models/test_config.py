from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GlmConfig

from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.config import BOOKKEEPING, native_config, official_config, read_config, rope_ratio
from glmtune.models.families import Family
from glmtune.models.settings import ModelSettings

OFFICIAL: dict[str, Any] = {
    "hidden_size": 64,
    "ffn_hidden_size": 80,
    "kv_channels": 16,
    "num_layers": 2,
    "num_attention_heads": 4,
    "padded_vocab_size": 176,
    "seq_length": 256,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
}
GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "models"


def test_sizes_and_switches() -> None:
    config = native_config(OFFICIAL | {"layernorm_epsilon": 2e-5}, Family.CHATGLM2)
    assert isinstance(config, GlmConfig)
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (64, 80, 16)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert (config.vocab_size, config.max_position_embeddings) == (176, 256)
    assert config.rms_norm_eps == 2e-5
    assert config.attention_bias
    assert (config.eos_token_id, config.pad_token_id) == (2, 0)


def test_very_early_configs_have_no_model_type_and_get_the_class_defaults() -> None:
    early = {name: value for name, value in OFFICIAL.items() if name not in {"add_qkv_bias"}}
    config = native_config(early, Family.CHATGLM2)
    assert not config.attention_bias
    assert config.rms_norm_eps == 1e-5
    separate = {name: value for name, value in OFFICIAL.items() if "multi_query" not in name}
    assert native_config(separate, Family.CHATGLM2).num_key_value_heads == 4


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        (Family.CHATGLM2_32K, {"rope_type": "linear", "factor": 16.0, "rope_theta": 10000.0}),
        (Family.CHATGLM2, {"rope_type": "linear", "factor": 16.0, "rope_theta": 10000.0}),
        (Family.CHATGLM3_32K, {"rope_type": "default", "rope_theta": 160000.0}),
        (Family.GLM4, {"rope_type": "default", "rope_theta": 160000.0}),
    ],
)
def test_the_two_rules_of_rope_ratio(family: Family, rope: dict[str, Any]) -> None:
    config = native_config(OFFICIAL | {"rope_ratio": 16, "eos_token_id": 2, "pad_token_id": 0}, family)
    assert dict(config.rope_parameters or {}) == rope | {"partial_rotary_factor": 0.5}
    assert rope_ratio(config) == 16
    assert official_config(config, family)["rope_ratio"] == 16


@pytest.mark.parametrize("family", [family for family in Family if family is not Family.CHATGLM])
def test_there_and_back(family: Family) -> None:
    config = native_config(
        OFFICIAL | {"torch_dtype": "float16", "eos_token_id": [2], "pad_token_id": 0}, family
    )
    official = official_config(config, family)
    assert OFFICIAL.items() <= official.items()
    assert official["torch_dtype"] == "float16"
    assert official["model_type"] == "chatglm"
    assert native_config(official, family).to_dict() == config.to_dict()


def test_official_files_come_back(oracles: Path) -> None:
    places = ("v2/checkpoint_bin", "v2_32k/checkpoint_bin", "glm3/checkpoint_bin", "glm4/checkpoint_bin")
    families = (Family.CHATGLM2, Family.CHATGLM2_32K, Family.CHATGLM3, Family.GLM4)
    for place, family in zip(places, families, strict=True):
        official = read_config(oracles / place)
        written = official_config(native_config(official, family), family)
        bookkeeping = BOOKKEEPING - {"auto_map", "architectures", "model_type"}
        assert {key: official[key] for key in official.keys() - bookkeeping} == {
            key: written[key] for key in written.keys() - bookkeeping
        }


def test_prefix_keys_are_tolerated() -> None:
    prefix = {"pre_seq_len": 128, "prefix_projection": [False], "quantization_bit": 0, "vocab_size": 176}
    assert native_config(OFFICIAL | prefix, Family.CHATGLM2).vocab_size == 176


def test_unknown_keys_are_named_with_their_values() -> None:
    with pytest.raises(
        CheckpointError, match=r"unknown keys: use_sliding = True, zebra = 7; they may change"
    ):
        native_config(OFFICIAL | {"zebra": 7, "use_sliding": True}, Family.CHATGLM2)


def test_missing_sizes_are_named() -> None:
    short = {name: value for name, value in OFFICIAL.items() if name != "kv_channels"}
    with pytest.raises(CheckpointError, match="kv_channels is missing"):
        native_config(short, Family.CHATGLM2)


@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("rmsnorm", False),
        ("add_bias_linear", True),
        ("post_layer_norm", False),
        ("apply_residual_connection_post_layernorm", True),
        ("fp32_residual_connection", True),
        ("hidden_dropout", 0.1),
        ("tie_word_embeddings", True),
        ("interleaved_qkv", True),
    ],
)
def test_switches_without_a_native_counterpart_are_refused(switch: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"{switch} is {value}"):
        native_config(OFFICIAL | {switch: value}, Family.CHATGLM2)


def test_contradictions_are_refused() -> None:
    with pytest.raises(
        CheckpointError, match="num_hidden_layers is 3, but it must equal num_layers, which is 2"
    ):
        native_config(OFFICIAL | {"num_hidden_layers": 3}, Family.GLM4)
    with pytest.raises(CheckpointError, match="multi_query_group_num is 3, but it must divide"):
        native_config(OFFICIAL | {"multi_query_group_num": 3}, Family.CHATGLM2)


def test_token_ids_and_dtype_are_checked() -> None:
    with pytest.raises(CheckpointError, match=r"eos_token_id 2 and pad_token_id 176 must be below .* 176"):
        native_config(OFFICIAL | {"pad_token_id": 176}, Family.CHATGLM2)
    with pytest.raises(CheckpointError, match="torch_dtype is 'int8', but must be float32"):
        native_config(OFFICIAL | {"torch_dtype": "int8"}, Family.CHATGLM2)
    config = native_config(OFFICIAL | {"eos_token_id": None, "pad_token_id": None}, Family.CHATGLM2)
    assert (config.eos_token_id, config.pad_token_id) == (2, 0)
    config = native_config(OFFICIAL | {"padded_vocab_size": 151552}, Family.GLM4)
    assert (config.eos_token_id, config.pad_token_id) == ([151329, 151336, 151338], 151329)


def test_quantized_and_first_generation_are_refused_for_now() -> None:
    with pytest.raises(CheckpointError, match=r"quantization_bit 4: .* not supported yet"):
        native_config(OFFICIAL | {"quantization_bit": 4}, Family.CHATGLM2)
    with pytest.raises(CheckpointError, match=r"first generation .*not supported yet"):
        native_config({"inner_hidden_size": 4}, Family.CHATGLM)
    with pytest.raises(CheckpointError, match="family: chatglm2"):
        native_config({"inner_hidden_size": 4}, Family.CHATGLM2)


def test_config_file_problems(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{,")
    with pytest.raises(CheckpointError, match=r"config\.json is no valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"holds a list"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL))
    assert read_config(tmp_path) == OFFICIAL


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dtype": "float8"}, "`model.dtype` is `float8`"),
        ({"device": "tpu"}, "`model.device` is `tpu`"),
        ({"source": " "}, "`model.source` is empty"),
        ({"family": "chatglm5"}, "`model.family` is `chatglm5`"),
    ],
)
def test_settings_refuse_what_they_do_not_know(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelSettings(**values)


def test_settings_accept_what_they_know() -> None:
    assert ModelSettings().source == "glm-tiny"
    ModelSettings(dtype="bfloat16", device="cuda:1", family="chatglm2-32k")
