"""Sizes, positions and epsilon of a model as the keys of a GGUF file, and back.

A key that is missing does not make llama.cpp stop: it takes a default (a rotary base of 10000, for one), and
the model answers a little worse. So every key that the model depends on is written, whatever its value, and
read back before an export appears.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Glm4Config, GlmConfig

from glmtune.errors import CheckpointError, ConfigError

ARCHITECTURES = {"glm": "chatglm", "glm4": "glm4"}
"""model_type of transformers → ``general.architecture`` of llama.cpp."""
_CLASSES: dict[str, type[GlmConfig] | type[Glm4Config]] = {"chatglm": GlmConfig, "glm4": Glm4Config}
_YARN_KEYS = {
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
}


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """What llama.cpp has to know of a model beside its tensors and its vocabulary.

    Attributes:
        architecture: ``chatglm`` or ``glm4``.
        context_length: tokens.
        embedding_length: hidden size.
        feed_forward_length: width of the gated layer.
        block_count: layers.
        head_count: query heads.
        head_count_kv: key/value heads.
        head_length: width of a head.
        epsilon: of the norms.
        rope_dimensions: numbers of a head that are rotated, in neighbouring pairs.
        rope_base: rotary base.
        rope_scaling: ``none``, ``linear`` (positions divided) or ``yarn``.
        rope_factor: what positions are divided by; 1 for ``none``.
        rope_original_length: tokens before scaling; with ``yarn`` only, else 0.
        vocab_size: rows of the embedding.
    """

    architecture: str
    context_length: int
    embedding_length: int
    feed_forward_length: int
    block_count: int
    head_count: int
    head_count_kv: int
    head_length: int
    epsilon: float
    rope_dimensions: int
    rope_base: float
    rope_scaling: str
    rope_factor: float
    rope_original_length: int
    vocab_size: int

    @classmethod
    def of(cls, config: GlmConfig | Glm4Config) -> Hyperparameters:
        """Read a native configuration.

        Args:
            config: as made by `native_config`.

        Raises:
            ConfigError: a model that llama.cpp cannot compute.
        """
        rope: dict[str, Any] = {**(config.rope_parameters or {})}
        scaling = rope.get("rope_type", "default")
        _check(config, rope)
        head_length, num_kv_heads = config.head_dim, config.num_key_value_heads
        assert head_length is not None
        assert num_kv_heads is not None
        return cls(
            architecture=ARCHITECTURES[config.model_type],
            context_length=config.max_position_embeddings,
            embedding_length=config.hidden_size,
            feed_forward_length=config.intermediate_size,
            block_count=config.num_hidden_layers,
            head_count=config.num_attention_heads,
            head_count_kv=num_kv_heads,
            head_length=head_length,
            epsilon=float(config.rms_norm_eps),
            rope_dimensions=int(head_length * rope.get("partial_rotary_factor", 1.0)),
            rope_base=float(rope["rope_theta"]),
            rope_scaling="none" if scaling == "default" else scaling,
            rope_factor=float(rope.get("factor", 1.0)),
            rope_original_length=_original_length(config, rope) if scaling == "yarn" else 0,
            vocab_size=config.vocab_size,
        )

    def keys(self) -> dict[str, int | float | str]:
        """Return the keys of the file; floats are float32 there."""
        keys: dict[str, int | float | str] = {
            "context_length": self.context_length,
            "embedding_length": self.embedding_length,
            "feed_forward_length": self.feed_forward_length,
            "block_count": self.block_count,
            "attention.head_count": self.head_count,
            "attention.head_count_kv": self.head_count_kv,
            "attention.key_length": self.head_length,
            "attention.value_length": self.head_length,
            "attention.layer_norm_rms_epsilon": self.epsilon,
            "rope.dimension_count": self.rope_dimensions,
            "rope.freq_base": self.rope_base,
            "vocab_size": self.vocab_size,
        }
        if self.rope_scaling != "none":
            keys |= {"rope.scaling.type": self.rope_scaling, "rope.scaling.factor": self.rope_factor}
        if self.rope_scaling == "yarn":
            keys["rope.scaling.original_context_length"] = self.rope_original_length
        return {f"{self.architecture}.{name}": value for name, value in keys.items()}

    @classmethod
    def from_keys(cls, architecture: str, found: Mapping[str, Any]) -> Hyperparameters:
        """Read the keys of a file.

        Args:
            architecture: ``general.architecture``.
            found: all keys and their values.

        Raises:
            CheckpointError: a key is missing, or the architecture is none of ours.
        """
        if architecture not in _CLASSES:
            raise CheckpointError(f"general.architecture is `{architecture}`, but must be chatglm or glm4.")

        def value(name: str, default: Any = None) -> Any:
            key = f"{architecture}.{name}"
            if key not in found and default is None:
                raise CheckpointError(
                    f"The file has no key `{key}`, for which llama.cpp would take a default."
                )
            return found.get(key, default)

        if value("attention.key_length") != value("attention.value_length"):
            raise CheckpointError("Keys and values have other lengths in the file, which no GLM has.")
        return cls(
            architecture=architecture,
            context_length=value("context_length"),
            embedding_length=value("embedding_length"),
            feed_forward_length=value("feed_forward_length"),
            block_count=value("block_count"),
            head_count=value("attention.head_count"),
            head_count_kv=value("attention.head_count_kv"),
            head_length=value("attention.key_length"),
            epsilon=value("attention.layer_norm_rms_epsilon"),
            rope_dimensions=value("rope.dimension_count"),
            rope_base=value("rope.freq_base"),
            rope_scaling=value("rope.scaling.type", "none"),
            rope_factor=value("rope.scaling.factor", 1.0),
            rope_original_length=value("rope.scaling.original_context_length", 0),
            vocab_size=value("vocab_size"),
        )

    def config(self, *, attention_bias: bool, tie_word_embeddings: bool) -> GlmConfig | Glm4Config:
        """Return transformers' configuration of the model that a file describes.

        Args:
            attention_bias: the file has biases of query, key and value.
            tie_word_embeddings: the file has no head of its own.
        """
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_base}
        rope["partial_rotary_factor"] = self.rope_dimensions / self.head_length
        if self.rope_scaling != "none":
            rope |= {"rope_type": self.rope_scaling, "factor": self.rope_factor}
        if self.rope_scaling == "yarn":
            rope["original_max_position_embeddings"] = self.rope_original_length
        return _CLASSES[self.architecture](
            vocab_size=self.vocab_size,
            hidden_size=self.embedding_length,
            intermediate_size=self.feed_forward_length,
            head_dim=self.head_length,
            num_hidden_layers=self.block_count,
            num_attention_heads=self.head_count,
            num_key_value_heads=self.head_count_kv,
            max_position_embeddings=self.context_length,
            rms_norm_eps=self.epsilon,
            rope_parameters=rope,  # pyright: ignore[reportArgumentType]
            attention_bias=attention_bias,
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=0,  # transformers' own default may lie above a small vocabulary
            eos_token_id=0,
        )

    def differences(self, other: Hyperparameters) -> list[str]:
        """Name the fields in which two models differ; floats may differ by what float32 rounds."""
        return [
            f"{name} is {mine}, but {theirs} in the other"
            for name in self.__slots__
            if not _is_same(mine := getattr(self, name), theirs := getattr(other, name))
        ]


def _is_same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, float):
        return math.isclose(mine, theirs, rel_tol=1e-6)
    return bool(mine == theirs)


def _original_length(config: GlmConfig | Glm4Config, rope: Mapping[str, Any]) -> int:
    return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


def _check(config: GlmConfig | Glm4Config, rope: Mapping[str, Any]) -> None:
    """Raise ConfigError for what `chatglm` and `glm4` of llama.cpp do not compute."""
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(
            f"`format` is `gguf`, but llama.cpp has no architecture of ours for `{config.model_type}`; it "
            f"has those for {' and '.join(ARCHITECTURES)}. Use `format=transformers`."
        )
    head_length = config.head_dim or 0
    width = config.num_attention_heads * head_length
    if config.model_type == "glm" and width != config.hidden_size:
        raise ConfigError(
            f"`format` is `gguf`, but llama.cpp's `chatglm` needs as many numbers in all heads as in the "
            f"hidden state: {config.num_attention_heads} heads of {head_length} make {width}, and "
            f"hidden_size is {config.hidden_size}. Use `format=transformers`."
        )
    scaling = rope.get("rope_type", "default")
    others = sorted(name for name in rope if name not in _YARN_KEYS and rope[name] is not None)
    if scaling == "yarn" and others:
        raise ConfigError(
            f"`format` is `gguf`, but the model's yarn scaling sets {', '.join(others)}, which a GGUF file "
            "has no keys for, or reads in another way. Use `format=transformers`."
        )
