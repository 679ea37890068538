"""Official config.json of the second generation and later, to transformers' GlmConfig and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GlmConfig

from glmtune.errors import CheckpointError
from glmtune.models.families import FAMILY_KEY, FIRST_GENERATION_KEYS, SECOND_GENERATION, Family

ROPE_BASE = 10000.0

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

NO_EFFECT = frozenset(
    {"original_rope", "bias_dropout_fusion", "apply_query_key_layer_scaling", "attention_softmax_in_fp32"}
)
"""Official keys that choose a way of computing, never another result."""

# fmt: off
HANDLED = frozenset({
    "add_qkv_bias", "multi_query_attention", "multi_query_group_num", "layernorm_epsilon", "rope_ratio",
    "attention_dropout", "num_hidden_layers", "vocab_size", "torch_dtype", "dtype", "use_cache",
    "eos_token_id", "pad_token_id", "bos_token_id", "quantization_bit", "quantization_embeddings",
    "pre_seq_len", "prefix_projection", "classifier_dropout",
})
"""Official keys read here, or meant for other parts (prefix, quantization, classifier)."""

BOOKKEEPING = frozenset({
    "_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset",
    "architectures", "auto_map", "model_type", "transformers_version", "is_encoder_decoder", "is_decoder",
    "return_dict", "output_hidden_states", "output_attentions", "id2label", "label2id", "num_labels",
    "problem_type", "torchscript", "use_bfloat16", "pruned_heads", "tf_legacy_loss",
    "task_specific_params", "finetuning_task", "chunk_size_feed_forward", "gradient_checkpointing",
    "max_length", "do_sample", "temperature", "top_p", "num_beams", "tokenizer_class",
    "initializer_range", FAMILY_KEY,
})
# fmt: on
"""Keys transformers writes for itself; they never change the architecture."""


def read_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json.

    Raises:
        CheckpointError: the file is absent or no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no config.json, which every official checkpoint has. "
            "Point `model.source` at the folder that holds config.json and the weights."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is no valid JSON ({error}). Download the file again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, but it must be a JSON object.")
    return content


def native_config(official: Mapping[str, Any], family: Family) -> GlmConfig:
    """Translate an official configuration.

    Args:
        official: content of config.json.
        family: release line; decides what rope_ratio means. ChatGLM2's divides positions (linear scaling),
            later ones multiply the rotary base.

    Returns:
        The configuration of an equivalent `GlmForCausalLM`, with two attributes of ours: `glmtune_family`,
        and `fused_per_head` (the checkpoint's fused projection is laid out head by head).

    Raises:
        CheckpointError: missing sizes, unknown keys, unsupported switches, a quantized or first-generation
            checkpoint; everything is named.
    """
    _refuse_other_formats(official, family)
    problems = _key_problems(official)
    if problems:
        raise CheckpointError(
            "config.json cannot be used:\n" + "\n".join(f"- {problem}" for problem in problems)
        )
    sizes = {native: int(official[name]) for name, native in SIZES.items()}
    num_heads = sizes["num_attention_heads"]
    shared_heads = bool(official.get("multi_query_attention", False))
    num_kv_heads = int(official.get("multi_query_group_num", 1)) if shared_heads else num_heads
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: multi_query_group_num is {num_kv_heads}, but it must divide num_attention_heads, "
            f"which is {num_heads}. Correct the file or download it again."
        )
    later = family not in SECOND_GENERATION
    eos, pad = _end_and_pad(official, family)
    return GlmConfig(
        **sizes,
        num_key_value_heads=num_kv_heads,
        attention_bias=bool(official.get("add_qkv_bias", False)),
        attention_dropout=float(official.get("attention_dropout", 0.0)),
        rms_norm_eps=float(official.get("layernorm_epsilon", 1e-5)),
        hidden_act="silu",
        rope_parameters=_rope_parameters(float(official.get("rope_ratio", 1)), multiply_base=later),
        tie_word_embeddings=False,
        use_cache=bool(official.get("use_cache", True)),
        eos_token_id=eos,
        pad_token_id=pad,
        bos_token_id=official.get("bos_token_id"),
        dtype=official.get("torch_dtype", official.get("dtype")),
        **{FAMILY_KEY: family.value, "fused_per_head": not shared_heads},
    )


def official_config(config: GlmConfig, family: Family) -> dict[str, Any]:
    """Translate back: the inverse of `native_config` up to bookkeeping keys.

    Args:
        config: as made by `native_config`.
        family: release line, written into the file so that no name has to tell it.

    Returns:
        Content of an official config.json, without `torch_dtype` when the configuration names none.
    """
    grouped = not getattr(config, "fused_per_head", False)
    official: dict[str, Any] = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": _auto_map(family),
        FAMILY_KEY: family.value,
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
    if config.dtype is not None:
        official["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    return dict(sorted(official.items()))


def rope_ratio(config: GlmConfig) -> float:
    """Return the official rope_ratio behind a native configuration (1 where there is none)."""
    rope: dict[str, Any] = {**(config.rope_parameters or {})}
    if rope.get("rope_type") == "linear":
        return float(rope["factor"])
    return float(rope.get("rope_theta", ROPE_BASE)) / ROPE_BASE


def _rope_parameters(ratio: float, *, multiply_base: bool) -> dict[str, Any]:
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


def _refuse_other_formats(official: Mapping[str, Any], family: Family) -> None:
    if family is Family.CHATGLM or FIRST_GENERATION_KEYS & official.keys():
        raise CheckpointError(
            "config.json describes the first generation (ChatGLM-6B: keys like inner_hidden_size), which "
            f"is not supported yet (family: {family}). Use a checkpoint of ChatGLM2 or later."
        )
    bits = official.get("quantization_bit") or 0
    if bits:
        raise CheckpointError(
            f"config.json has quantization_bit {bits}: quantized official checkpoints are not supported yet. "
            "Use the unquantized release of the same model (the name without -int4 or -int8)."
        )


def _key_problems(official: Mapping[str, Any]) -> list[str]:
    problems = [f"{name} is missing; every official file has it" for name in SIZES if name not in official]
    for name, (value, meaning) in ONLY_VALUE.items():
        if name in official and official[name] != value:
            problems.append(
                f"{name} is {official[name]!r} ({meaning}), but only {value!r}, as in every release, "
                "is supported"
            )
    stored = official.get("torch_dtype", official.get("dtype"))
    if stored not in (None, "float32", "bfloat16", "float16"):
        problems.append(f"torch_dtype is {stored!r}, but must be float32, bfloat16 or float16")
    known = SIZES.keys() | ONLY_VALUE.keys() | NO_EFFECT | HANDLED | BOOKKEEPING
    unknown = sorted(official.keys() - known)
    if unknown:
        problems.append(
            f"unknown keys: {', '.join(f'{name} = {official[name]!r}' for name in unknown)}; they may change "
            "the architecture, so nothing was loaded. Remove them from the file if you know that they do not"
        )
    for name, same in (("num_hidden_layers", "num_layers"), ("vocab_size", "padded_vocab_size")):
        if name in official and same in official and official[name] != official[same]:
            problems.append(
                f"{name} is {official[name]}, but it must equal {same}, which is {official[same]}"
            )
    return problems


def _auto_map(family: Family) -> dict[str, str]:
    """Where the released code would look for its classes, for tools that still use it."""
    model = "modeling_chatglm.ChatGLMForConditionalGeneration"
    names = {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": model}
    names |= {"AutoModelForCausalLM": model, "AutoModelForSeq2SeqLM": model}
    if family not in SECOND_GENERATION:
        names["AutoModelForSequenceClassification"] = "modeling_chatglm.ChatGLMForSequenceClassification"
    return names
