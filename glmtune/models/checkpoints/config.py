"""Official config.json to a native configuration (ChatGlmConfig for ChatGLM-6B, else GlmConfig) and back.

Every key of the file must be accounted for: it is translated, or it has the one value that all releases have,
or it is known to change nothing. Any other key is refused, because it may switch on something we do not
compute, and such a model would load, run and answer a little worse, which nobody would trace back to a key.

Both directions are here, so that a checkpoint we write says what the released code and other tools need. What
the official keys cannot say (family, position rule, quantization by groups) goes into keys of ours, whose
names begin with ``glmtune_``; the released code ignores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Glm4Config, GlmConfig

from glmtune.errors import CheckpointError, unknown_name
from glmtune.models.architectures.chatglm_config import POSITION_RULES, ChatGlmConfig
from glmtune.models.checkpoints.config_rules import is_other
from glmtune.models.checkpoints.quantized_layout import (
    LAYOUT_KEY,
    QuantizedLayout,
    official_keys,
    stored_layout,
    without_our_mark,
)
from glmtune.models.checkpoints.transformers_format import (
    PER_HEAD_KEY,
    ROPE_BASE,
    is_transformers_format,
    transformers_config,
    transformers_values,
)
from glmtune.models.releases.families import (
    FAMILY_KEY,
    FIRST_GENERATION_KEYS,
    NATIVE_TYPES,
    SECOND_GENERATION,
    Family,
    family_of_config,
)
from glmtune.storage.json_files import shown

NativeConfig = GlmConfig | Glm4Config | ChatGlmConfig
"""Configuration of a model of any generation."""

POSITION_RULE_KEY = "glmtune_position_rule"
"""Key we write into config.json of ChatGLM-6B; it decides between the releases' position rules."""

SIZES = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "kv_channels": "head_dim",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "padded_vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
}
"""Official name → GlmConfig name of the sizes that must be present."""

FIRST_SIZES = {
    "hidden_size": "hidden_size",
    "inner_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
}
"""Official name → ChatGlmConfig name of the sizes that must be present in the first generation."""

FIRST_TOKENS = {"mask_token_id": 0, "gmask_token_id": 1, "bos_token_id": 4, "eos_token_id": 5}
"""Special tokens of the first generation, counted from the first one; early files leave some out."""
NUM_TEXT_TOKENS, NUM_IMAGE_TOKENS, FIRST_PAD = 130_000, 20_000, 3
"""Where the special tokens start, what the files of March 2023 have in front of all, and the pad piece.

The first files had 20,000 image tokens in the vocabulary; the release of April cut them out, weights and all.
Both are in use, so the size of the vocabulary tells where the ids begin."""

ONLY_VALUE: dict[str, tuple[Any, str]] = {
    "rmsnorm": (True, "LayerNorm with bias instead of RMSNorm"),
    "add_bias_linear": (False, "biases on every linear layer"),
    "post_layer_norm": (True, "no norm after the last block"),
    "apply_residual_connection_post_layernorm": (False, "the residual taken after the norm"),
    "fp32_residual_connection": (False, "a float32 residual stream"),
    "hidden_dropout": (0.0, "dropout on the residual branches"),
    "tie_word_embeddings": (False, "one matrix for embedding and head"),
    "interleaved_qkv": (False, "interleaved query, key and value rows"),
}
"""Switch → (the value of every release, what another value would mean); another value is refused."""

FIRST_ONLY_VALUE: dict[str, tuple[Any, str]] = {
    "tie_word_embeddings": (True, "separate matrices for embedding and head"),
    "hidden_dropout": (0.0, "dropout on the residual branches"),
    "attention_dropout": (0.0, "dropout on the attention weights"),
}
"""The same for the first generation."""

NO_EFFECT = frozenset(
    {"original_rope", "bias_dropout_fusion", "apply_query_key_layer_scaling", "attention_softmax_in_fp32"}
)
"""Official keys that choose a way of computing, never another result; any value is taken."""

# fmt: off
HANDLED = frozenset({
    "add_qkv_bias", "multi_query_attention", "multi_query_group_num", "layernorm_epsilon", "rope_ratio",
    "attention_dropout", "num_hidden_layers", "vocab_size", "torch_dtype", "dtype", "use_cache",
    "eos_token_id", "pad_token_id", "bos_token_id", "quantization_bit", "quantization_embeddings",
    "pre_seq_len", "prefix_projection", "classifier_dropout",
})
"""Official keys read here, or meant for other parts (prefix, quantization, classifier)."""

FIRST_HANDLED = frozenset({
    *FIRST_TOKENS, "pad_token_id", "layernorm_epsilon", "position_encoding_2d", "use_cache", "torch_dtype",
    "dtype", "quantization_bit", "quantization_embeddings", "pre_seq_len", "prefix_projection",
    POSITION_RULE_KEY,
})
"""The same for the first generation."""

BOOKKEEPING = frozenset({
    "_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset",
    "architectures", "auto_map", "model_type", "transformers_version", "is_encoder_decoder", "is_decoder",
    "return_dict", "output_hidden_states", "output_attentions", "id2label", "label2id", "num_labels",
    "problem_type", "torchscript", "use_bfloat16", "pruned_heads", "tf_legacy_loss",
    "task_specific_params", "finetuning_task", "chunk_size_feed_forward", "gradient_checkpointing",
    "max_length", "do_sample", "temperature", "top_p", "num_beams", "tokenizer_class",
    "initializer_range", FAMILY_KEY, LAYOUT_KEY,
})
# fmt: on
"""Keys transformers writes for itself; they never change the architecture."""


def native_config(official: Mapping[str, Any], family: Family) -> NativeConfig:
    """Translate an official configuration, or take one in transformers' format as it is.

    Args:
        official: content of config.json.
        family: release line; decides what rope_ratio means. ChatGLM2's divides positions (linear scaling),
            later ones multiply the rotary base.

    Returns:
        For ChatGLM-6B a `ChatGlmConfig`, for GLM-4-0414 and Z1 a `Glm4Config`; for the others the
        configuration of an equivalent `GlmForCausalLM`. With attributes of ours: `glmtune_family` (read by
        `family_of_config`), `fused_per_head` (whether the checkpoint's fused projection is laid out head by
        head; read by the function of that name), the format if it is transformers', and, if the checkpoint is
        quantized, what `QuantizedLayout.of` reads.

    Raises:
        CheckpointError: missing sizes, unknown keys, unsupported switches, a family of another generation;
            everything is named.
    """
    if is_other(official):
        raise CheckpointError(
            f"config.json has model_type {shown(official['model_type'])}, which transformers computes and "
            "glmtune does not: it cannot be quantized, divided among processes or exported. It can be "
            "evaluated and asked (`glmtune eval`, `compare`, `chat`); of a mixture of experts a LoRA can be "
            "tuned and planned."
        )
    if official.get("model_type") in NATIVE_TYPES:
        config = transformers_config(official, family)
        setattr(config, PER_HEAD_KEY, False)
        return config
    official = without_our_mark(official)
    # First: read as another generation, nearly every key would be reported as missing or unknown.
    _refuse_other_generation(official, family)
    is_first = family is Family.CHATGLM
    if is_first:
        _refuse(_key_problems(official, FIRST_SIZES, FIRST_ONLY_VALUE, FIRST_HANDLED))
        config = _first_native_config(official)
    else:
        problems = _key_problems(official, SIZES, ONLY_VALUE, HANDLED | NO_EFFECT)
        _refuse(problems + _repeated_key_problems(official))
        config = _later_native_config(official, family)
    layout = stored_layout(official, has_embeddings=is_first)
    if layout is not None:
        layout.put_into(config)
    return config


def stored_config(config: NativeConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json of the format that a checkpoint of this configuration is stored in.

    Args:
        config: as made by `native_config`.
        dtype: floating type of the weights.
    """
    if is_transformers_format(config):
        return transformers_values(config, dtype)
    values = official_config(config, family_of_config(config))
    return values | {"torch_dtype": str(dtype).removeprefix("torch.")}


def official_config(config: NativeConfig, family: Family) -> dict[str, Any]:
    """Translate back: the inverse of `native_config` up to bookkeeping keys.

    Args:
        config: as made by `native_config`.
        family: release line, written into the file so that no name has to tell it.

    Returns:
        Content of an official config.json, without `torch_dtype` when the configuration names none.
    """
    is_first = isinstance(config, ChatGlmConfig)
    official = _first_official_config(config) if is_first else _later_official_config(config, family)
    official |= {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": _auto_map(family),
        FAMILY_KEY: family.value,
        **official_keys(QuantizedLayout.of(config), has_embeddings=is_first),
    }
    if config.dtype is not None:
        official["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    return dict(sorted(official.items()))


def _first_native_config(official: Mapping[str, Any]) -> ChatGlmConfig:
    sizes: dict[str, Any] = {native: int(official[name]) for name, native in FIRST_SIZES.items()}
    two_streams = bool(official.get("position_encoding_2d", True))
    unit = sizes["num_attention_heads"] * (4 if two_streams else 2)
    if sizes["hidden_size"] % unit:
        raise CheckpointError(
            f"config.json: hidden_size is {sizes['hidden_size']}, but it must be a multiple of {unit}: "
            f"{sizes['num_attention_heads']} heads of rotary pairs. Correct the file or download it again."
        )
    # Early files leave out some ids, and there they follow from where the special tokens begin.
    images = NUM_IMAGE_TOKENS if sizes["vocab_size"] > NUM_TEXT_TOKENS + NUM_IMAGE_TOKENS else 0
    tokens: dict[str, Any] = {
        name: NUM_TEXT_TOKENS + images + offset for name, offset in FIRST_TOKENS.items()
    }
    tokens["pad_token_id"] = FIRST_PAD + images
    tokens |= {name: int(official[name]) for name in tokens if official.get(name) is not None}
    outside = {name: token for name, token in tokens.items() if token >= sizes["vocab_size"]}
    if outside:
        raise CheckpointError(
            f"config.json: {', '.join(f'{name} {token}' for name, token in outside.items())} must be below "
            f"vocab_size, which is {sizes['vocab_size']}. Correct or add these keys in the file."
        )
    # The rule of block positions changed together with the vocabulary; a file of ours says it.
    rule = official.get(POSITION_RULE_KEY, POSITION_RULES[1] if images else POSITION_RULES[0])
    if rule not in POSITION_RULES:
        raise CheckpointError("config.json: " + unknown_name(f"`{POSITION_RULE_KEY}`", rule, POSITION_RULES))
    return ChatGlmConfig(
        **sizes,
        **tokens,
        layer_norm_eps=float(official.get("layernorm_epsilon", 1e-5)),
        position_encoding_2d=two_streams,
        position_rule=rule,
        use_cache=bool(official.get("use_cache", True)),
        dtype=official.get("torch_dtype", official.get("dtype")),
    )


def _first_official_config(config: ChatGlmConfig) -> dict[str, Any]:
    return {
        **{name: getattr(config, native) for name, native in FIRST_SIZES.items()},
        **{name: getattr(config, name) for name in (*FIRST_TOKENS, "pad_token_id")},
        "layernorm_epsilon": config.layer_norm_eps,
        "position_encoding_2d": config.position_encoding_2d,
        POSITION_RULE_KEY: config.position_rule,
        "use_cache": config.use_cache,
    }


def _later_native_config(official: Mapping[str, Any], family: Family) -> GlmConfig:
    sizes = {native: int(official[name]) for name, native in SIZES.items()}
    num_heads = sizes["num_attention_heads"]
    # Without multi_query_attention the released code ignores multi_query_group_num, whatever it says.
    shared_heads = bool(official.get("multi_query_attention", False))
    num_kv_heads = int(official.get("multi_query_group_num", 1)) if shared_heads else num_heads
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: multi_query_group_num is {num_kv_heads}, but it must divide num_attention_heads, "
            f"which is {num_heads}. Correct the file or download it again."
        )
    later = family not in SECOND_GENERATION
    eos, pad = _end_and_pad(official, family)
    our_keys: dict[str, Any] = {FAMILY_KEY: family.value, PER_HEAD_KEY: not shared_heads}
    return GlmConfig(
        **sizes,
        num_key_value_heads=num_kv_heads,
        attention_bias=bool(official.get("add_qkv_bias", False)),
        attention_dropout=float(official.get("attention_dropout", 0.0)),
        rms_norm_eps=float(official.get("layernorm_epsilon", 1e-5)),
        hidden_act="silu",
        # Rotary on the first half of each head, in interleaved pairs, is what GlmModel computes by itself.
        rope_parameters=_rope_parameters(float(official.get("rope_ratio", 1)), multiply_base=later),
        tie_word_embeddings=False,
        use_cache=bool(official.get("use_cache", True)),
        eos_token_id=eos,
        pad_token_id=pad,
        bos_token_id=official.get("bos_token_id"),
        dtype=official.get("torch_dtype", official.get("dtype")),
        **our_keys,
    )


def _later_official_config(config: GlmConfig | Glm4Config, family: Family) -> dict[str, Any]:
    grouped = not fused_per_head(config)
    official: dict[str, Any] = {
        **{name: getattr(config, native) for name, native in SIZES.items()},
        **{name: value for name, (value, _) in ONLY_VALUE.items() if name != "interleaved_qkv"},
        **dict.fromkeys(sorted(NO_EFFECT), True),
        "add_qkv_bias": config.attention_bias,
        "attention_dropout": config.attention_dropout,
        "layernorm_epsilon": config.rms_norm_eps,
        "multi_query_attention": grouped,
        "multi_query_group_num": config.num_key_value_heads if grouped else 1,
        "use_cache": config.use_cache,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    if config.bos_token_id is not None:
        official["bos_token_id"] = config.bos_token_id
    if family is Family.GLM4:
        official["num_hidden_layers"] = config.num_hidden_layers
    ratio = rope_ratio(config)
    if ratio != 1:
        official["rope_ratio"] = int(ratio) if ratio == int(ratio) else ratio
    return official


def fused_per_head(config: NativeConfig) -> bool:
    """Say how a checkpoint of this configuration orders the rows of its fused query/key/value projection.

    There is no default: rows taken in the other order have the right shapes and make a model that talks
    nonsense, without any error.

    Args:
        config: as made by `native_config`.

    Returns:
        True for head by head, False for all queries, all keys, all values; see `FusedLayout`.

    Raises:
        CheckpointError: the configuration does not say it, so it was made in another way.
    """
    if not hasattr(config, PER_HEAD_KEY):
        raise CheckpointError(
            f"This {type(config).__name__} does not say how the rows of query_key_value are ordered: it has "
            f"no `{PER_HEAD_KEY}`, and guessing would mix up the heads. Make it with `native_config` from an "
            f"official config.json, or set `config.{PER_HEAD_KEY}` (False with multi_query_attention)."
        )
    return bool(getattr(config, PER_HEAD_KEY))


def rope_ratio(config: GlmConfig | Glm4Config) -> float:
    """Return the official rope_ratio behind a native configuration (1 where there is none)."""
    rope: dict[str, Any] = {**(config.rope_parameters or {})}
    if rope.get("rope_type") == "linear":
        return float(rope["factor"])
    return float(rope.get("rope_theta", ROPE_BASE)) / ROPE_BASE


def _rope_parameters(ratio: float, *, multiply_base: bool) -> dict[str, Any]:
    """Word rope_ratio as transformers does.

    One key, two meanings: modeling_chatglm.py of ChatGLM2-6B-32K divides the positions by it (position
    interpolation, arXiv:2306.15595), those of ChatGLM3-6B-128K and GLM-4 multiply the base.
    """
    rope = {"rope_type": "default", "rope_theta": ROPE_BASE, "partial_rotary_factor": 0.5}
    if ratio == 1:
        return rope
    if multiply_base:
        return rope | {"rope_theta": ROPE_BASE * ratio}
    return rope | {"rope_type": "linear", "factor": ratio}


def _end_and_pad(official: Mapping[str, Any], family: Family) -> tuple[int | list[int], int]:
    """Token ids that end and fill a text; early configs leave them to the tokenizer, whose ids these are."""
    eos: int | list[int] | None = official.get("eos_token_id")
    pad: int | None = official.get("pad_token_id")
    if eos is None:
        eos = [151329, 151336, 151338] if family is Family.GLM4 else 2
    if pad is None:
        pad = 151329 if family is Family.GLM4 else 0
    highest, vocab = max(*([eos] if isinstance(eos, int) else eos), pad), int(official["padded_vocab_size"])
    if highest >= vocab:
        raise CheckpointError(
            f"config.json: eos_token_id {eos} and pad_token_id {pad} must be below padded_vocab_size, "
            f"which is {vocab}. Correct or add these keys in the file."
        )
    return eos, pad


def _refuse(problems: list[str]) -> None:
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise CheckpointError(f"config.json cannot be used:\n{listed}")


def _refuse_other_generation(official: Mapping[str, Any], family: Family) -> None:
    is_first = bool(FIRST_GENERATION_KEYS & official.keys())
    if is_first != (family is Family.CHATGLM):
        kind = "the first generation (ChatGLM-6B)" if is_first else "ChatGLM2 or a later release"
        raise CheckpointError(
            f"config.json has the keys of {kind}, but it was to be read as family: {family.value}. "
            "Leave `family` (`model.family`) out, or name the family of this checkpoint."
        )


def _key_problems(
    official: Mapping[str, Any],
    sizes: Mapping[str, str],
    only_value: Mapping[str, tuple[Any, str]],
    handled: frozenset[str],
) -> list[str]:
    problems = [f"{name} is missing; every official file has it" for name in sizes if name not in official]
    for name, (value, meaning) in only_value.items():
        if name in official and official[name] != value:
            problems.append(
                f"{name} is {shown(official[name])} ({meaning}), but only {value!r}, as in every release, "
                "is supported"
            )
    stored = official.get("torch_dtype", official.get("dtype"))
    if stored not in (None, "float32", "bfloat16", "float16"):
        problems.append(f"torch_dtype is {shown(stored)}, but must be float32, bfloat16 or float16")
    unknown = sorted(official.keys() - (sizes.keys() | only_value.keys() | handled | BOOKKEEPING))
    if unknown:
        named = ", ".join(f"{shown(name)[1:-1]} = {shown(official[name])}" for name in unknown[:12])
        problems.append(
            f"unknown keys: {named}{', ...' if len(unknown) > 12 else ''}; they may change "
            "the architecture, so nothing was loaded. Remove them from the file if you know that they do not"
        )
    return problems


def _repeated_key_problems(official: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {official[name]}, but it must equal {same}, which is {official[same]}"
        for name, same in (("num_hidden_layers", "num_layers"), ("vocab_size", "padded_vocab_size"))
        if name in official and same in official and official[name] != official[same]
    ]


def _auto_map(family: Family) -> dict[str, str]:
    """Where the released code would look for its classes, for tools that still use it."""
    model = "modeling_chatglm.ChatGLMForConditionalGeneration"
    names = {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": model}
    names["AutoModelForSeq2SeqLM"] = model
    if family is Family.CHATGLM:
        return names
    names["AutoModelForCausalLM"] = model
    if family not in SECOND_GENERATION:
        names["AutoModelForSequenceClassification"] = "modeling_chatglm.ChatGLMForSequenceClassification"
    return names
