from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GlmConfig

from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.checkpoints.config import BOOKKEEPING, native_config, official_config, rope_ratio
from glmtune.models.checkpoints.config_rules import read_config
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.models.releases.families import Family
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
FIRST: dict[str, Any] = {
    "hidden_size": 64,
    "inner_hidden_size": 80,
    "num_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 176,
    "max_sequence_length": 256,
    "position_encoding_2d": True,
    "mask_token_id": 160,
    "gmask_token_id": 161,
    "bos_token_id": 164,
    "eos_token_id": 165,
    "pad_token_id": 3,
}
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "models"


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


def test_quantized_checkpoints_say_how_they_are_stored() -> None:
    config = native_config(OFFICIAL | {"quantization_bit": 4}, Family.CHATGLM2)
    assert QuantizedLayout.of(config) == QuantizedLayout(4, method="int4")
    assert official_config(config, Family.CHATGLM2)["quantization_bit"] == 4
    first = FIRST | {"quantization_bit": 8, "quantization_embeddings": True}
    config = native_config(first, Family.CHATGLM)
    assert QuantizedLayout.of(config) == QuantizedLayout(8, embeddings=True, method="int8")
    written = official_config(config, Family.CHATGLM)
    assert (written["quantization_bit"], written["quantization_embeddings"]) == (8, True)
    with pytest.raises(CheckpointError, match=r"quantization_bit 3, but the official formats have 4 or 8"):
        native_config(OFFICIAL | {"quantization_bit": 3}, Family.CHATGLM2)
    with pytest.raises(CheckpointError, match="quantization_embeddings true, but only ChatGLM-6B"):
        native_config(OFFICIAL | {"quantization_bit": 4, "quantization_embeddings": True}, Family.CHATGLM2)
    written["glmtune_quantization"]["bits"] = 4
    with pytest.raises(CheckpointError, match=r"says 4 bits .* quantization_bit is 8 .* must agree"):
        native_config(written, Family.CHATGLM)


def test_a_family_of_another_generation_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"keys of ChatGLM2 or .* family: chatglm\."):
        native_config(OFFICIAL, Family.CHATGLM)
    with pytest.raises(CheckpointError, match=r"keys of the first generation .* family: chatglm2\."):
        native_config(FIRST, Family.CHATGLM2)


def test_first_generation_there_and_back() -> None:
    config = native_config(FIRST | {"torch_dtype": "float16"}, Family.CHATGLM)
    assert isinstance(config, ChatGlmConfig)
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (64, 80, 16)
    assert (config.num_hidden_layers, config.num_key_value_heads, config.max_position_embeddings) == (
        2,
        4,
        256,
    )
    official = official_config(config, Family.CHATGLM)
    assert FIRST.items() <= official.items()
    assert official["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM"}
    assert native_config(official, Family.CHATGLM).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("vocab", "mask", "gmask", "sop", "eop", "pad", "rule"),
    [
        (130528, 130000, 130001, 130004, 130005, 3, "final"),
        (150528, 150000, 150001, 150004, 150005, 20003, "march_2023"),
    ],
)
def test_vocabulary_layouts_of_the_first_generation(
    vocab: int, mask: int, gmask: int, sop: int, eop: int, pad: int, rule: str
) -> None:
    sizes = {name: value for name, value in FIRST.items() if not name.endswith("token_id")}
    config = native_config(sizes | {"vocab_size": vocab}, Family.CHATGLM)
    assert isinstance(config, ChatGlmConfig)
    assert (config.mask_token_id, config.gmask_token_id, config.bos_token_id) == (mask, gmask, sop)
    assert (config.eos_token_id, config.pad_token_id, config.position_rule) == (eop, pad, rule)
    chosen = {"vocab_size": vocab, "glmtune_position_rule": "final"}
    assert native_config(sizes | chosen, Family.CHATGLM).position_rule == "final"


def test_problems_of_a_first_generation_file_are_named() -> None:
    missing = {name: value for name, value in FIRST.items() if name != "inner_hidden_size"}
    with pytest.raises(CheckpointError, match="inner_hidden_size is missing") as caught:
        native_config(missing | {"zebra": 7, "tie_word_embeddings": False}, Family.CHATGLM)
    assert "unknown keys: zebra = 7" in str(caught.value)
    assert "tie_word_embeddings is False (separate matrices" in str(caught.value)
    with pytest.raises(CheckpointError, match="hidden_size is 72, but it must be a multiple of 16"):
        native_config(FIRST | {"hidden_size": 72}, Family.CHATGLM)
    with pytest.raises(CheckpointError, match="bos_token_id 176 must be below vocab_size, which is 176"):
        native_config(FIRST | {"bos_token_id": 176}, Family.CHATGLM)
    with pytest.raises(CheckpointError, match=r"`glmtune_position_rule` is `march`, .* `march_2023`"):
        native_config(FIRST | {"glmtune_position_rule": "march"}, Family.CHATGLM)


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
