"""What every loaded model has beside its architecture, and the class of ChatGLM-6B (others: later.py).

::

    ChatGLM-6B     OfficialChatGlmForCausalLM = OfficialModel + our `ChatGlmForCausalLM`
    later releases OfficialGlmForCausalLM     = OfficialModel + transformers' `GlmForCausalLM`

The architectures know tensors alone. Checkpoints, fingerprints and `chat` are added here, above all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from glmtune.errors import ConfigError
from glmtune.models.architectures.chatglm import ChatGlmForCausalLM
from glmtune.models.architectures.chatglm_inputs import padding_mask
from glmtune.models.architectures.kv_cache import let_grow
from glmtune.models.chat.chat import ChatMixin
from glmtune.models.chat.held import check_not_held
from glmtune.models.checkpoints.fingerprint import fingerprinted_names, sampled_signs, signs_fingerprint
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.models.checkpoints.writing import DEFAULT_SHARD_BYTES, save_official
from glmtune.models.devices import choose_device
from glmtune.models.releases.families import Family, family_of_config
from glmtune.models.settings import ACCELERATORS
from glmtune.settings import check_strength
from glmtune.switch.model import generation_keywords

INSTEAD: Mapping[str, str] = {
    "stream_generate": "Use `model.stream_chat`, or `model.generate(..., streamer=...)`.",
    "build_stream_inputs": "Use `model.stream_chat(..., past_key_values=...)`, which goes on from its cache.",
    "process_response": "Use `model.chat`, whose answer is processed already.",
    "transformer": (
        "Layers are in `model.model.layers`, and a tuned prefix comes by "
        "`glmtune.load_model(source, prefix=FOLDER)`."
    ),
}
"""Attributes of the releases' models → what to write; ChatGLM-6B has its ``transformer``."""


class InPlaceQuantizer(Protocol):
    """What a loaded model asks of quantization, which stands above models.

    `glmtune.quantization.in_place` implements it; the loaders of `glmtune.loading` hand it to every model.
    """

    def quantize(self, model: Any, bits: int) -> None:
        """Turn the linear layers of a loaded model into codes."""
        ...

    def prepare(self, model: Any) -> None:
        """Give layers of codes the fastest products, which a cast or a move took away."""
        ...


class OfficialModel(ChatMixin):
    """Makes a causal LM of transformers write official checkpoints and know its release line and fingerprint.

    Attributes:
        source: what the user named; the folder's path or "" for a model made from a configuration.
        stored_layout: how the weights are or were codes, where the configuration does not tell: because the
            model holds the floating point weights behind them, or another library quantized it.
        stored_dtype: floating type of the checkpoint; None for a model made from a configuration.
        in_place_quantizer: from the loaders of `glmtune.loading`; None for other models.
        wants_products: layers of codes are to have the fastest products whenever the model generates.
        use_switch: obey the switch of what is attached, if it has one; False: it applies to every prompt.
    """

    config: Any
    generation_config: GenerationConfig | None
    named_parameters: Any
    named_modules: Any
    source: str = ""
    stored_layout: QuantizedLayout | None = None
    stored_dtype: torch.dtype | None = None
    in_place_quantizer: InPlaceQuantizer | None = None
    wants_products: bool = False
    use_switch: bool = True
    _has_products: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in; where its embedding is codes, that of the rows looked up.

        transformers (5.24) takes the first floating parameter, which would be the float16 scale of the codes.
        """
        embedding: Any = cast(PreTrainedModel, self).get_input_embeddings()
        like = getattr(embedding, "output_like", None)
        return cast(Any, PreTrainedModel).dtype.fget(self) if like is None else like.dtype

    @property
    def family(self) -> Family:
        """The release line, stored in the configuration.

        Raises:
            CheckpointError: see `family_of_config`.
        """
        return family_of_config(self.config)

    def save_pretrained(  # the parent's own arguments that mean something here
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int = DEFAULT_SHARD_BYTES,
        **_: object,
    ) -> None:
        """Write an official checkpoint and generation_config.json, which `load_official` reads back.

        Replaces `PreTrainedModel.save_pretrained`, which would write native names. transformers' Trainer
        calls it for every checkpoint.

        Args:
            save_directory: created if absent.
            is_main_process: other processes of a distributed run write nothing.
            state_dict: weights gathered by a trainer, native names; None takes the model's own.
            max_shard_size: bytes per weight file.
            **_: arguments of the parent without meaning here (safetensors are always written).
        """
        if not is_main_process:
            return
        save_official(
            cast(PreTrainedModel, self),
            Path(save_directory),
            max_shard_bytes=max_shard_size,
            state_dict=state_dict,
        )
        if self.generation_config is not None:
            self.generation_config.save_pretrained(save_directory)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Let the cache that `generate` makes for itself grow in place; see to the products of codes.

        `GenerationMixin.generate` (transformers 5) calls this once, before the first token. A cache that the
        caller gave is left as it is.
        """
        if self.wants_products and not self._has_products and not cast(Any, self).training:
            assert self.in_place_quantizer is not None
            self.in_place_quantizer.prepare(self)
            self._has_products = True
        was_given = model_kwargs.get("cache") is not None
        parent: Any = super()
        parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if not was_given:
            let_grow(model_kwargs.get("cache"))

    def build_inputs(
        self, tokenizer: PreTrainedTokenizerBase, query: str, history: Sequence[Any] | None = None
    ) -> Any:
        """Encode a question for `generate`, as the method of this name of the releases does.

        Args:
            tokenizer: of this model.
            query: the question.
            history: earlier turns, as `chat` returned them.

        Returns:
            Tensors ``[1, S]`` on the model's device.
        """
        return cast(Any, tokenizer).build_chat_input(query, history).to(cast(Any, self).device)

    def __getattr__(self, name: str) -> Any:
        """Called by Python for names that are nowhere else: what scripts of the releases use says its way."""
        parent: Any = super()
        try:
            return parent.__getattr__(name)  # submodules, parameters and buffers are found here
        except AttributeError:
            if name not in INSTEAD:
                raise
        raise AttributeError(f"`model.{name}` of the releases is not here. {INSTEAD[name]}")

    def generate(
        self, inputs: Tensor | None = None, *args: Any, use_switch: bool | None = None, **kwargs: Any
    ) -> Any:
        """Generate as every transformers model does, each prompt with or without what was tuned.

        A prefix or LoRA with a switch (``prefix.switch=true``) applies to the prompts that it decides for:
        the base reads them first, and rows that are switched off answer as the base does.

        Args:
            inputs: see `GenerationMixin.generate`; prompts ``[B, S]``.
            *args: see there.
            use_switch: False applies what was tuned to every prompt; None obeys ``model.use_switch``.
            **kwargs: see there; ``prefix_strength`` too.

        Raises:
            ConfigError: ``use_switch`` is True, but there is no switch.
        """
        check_not_held(cast(Any, self), "model.generate")
        mask = padding_mask(kwargs.get("attention_mask"))
        decided = generation_keywords(
            cast(Any, self), inputs, {**kwargs, "attention_mask": mask}, use_switch=use_switch
        )
        parent: Any = super()
        return parent.generate(inputs, *args, **kwargs, **decided)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Let ``generate(prefix_strength=)`` pass, which goes on to the attached prefix with every forward.

        `GenerationMixin.generate` (transformers 5) calls this first and refuses what no signature names.
        """
        check_not_held(cast(Any, self), "model.generate")
        strength = model_kwargs.pop("prefix_strength", None)
        model_kwargs.pop("tuned_rows", None)  # of `generate` above
        parent: Any = super()
        parent._validate_model_kwargs(model_kwargs)
        if strength is not None:
            self._check_strength(strength)
            if self._has_prefix:  # 1 as well: the model may have been loaded with another one
                model_kwargs["prefix_strength"] = float(cast(float, strength))

    @property
    def _has_prefix(self) -> bool:
        return getattr(cast(Any, self).base_model, "prefix_encoder", None) is not None

    def _check_strength(self, strength: object) -> None:
        """Raise ConfigError for a strength that no prefix can have, or where there is none to have it."""
        if check_strength("prefix_strength", strength) != 1 and not self._has_prefix:
            raise ConfigError(
                f"`prefix_strength` is {strength}, but no prefix is attached to this model. Load it with "
                "`glmtune.load_model(source, prefix=FOLDER)`, or leave the strength out."
            )

    def quantize(self, bits: int) -> Self:
        """Quantize the linear layers of the blocks in place, as the method of this name of the releases does.

        The result is that of ``glmtune.load_model(source, quantization="int4")`` (or ``"int8"``), which needs
        less memory and knows better formats (``int4-g64``).

        Args:
            bits: 4 or 8.

        Returns:
            This model.

        Raises:
            ConfigError: other bits; the model is quantized already; an adapter wraps its layers; it does not
                come from a loader of glmtune.
            CheckpointError: a weight is not finite.
        """
        if isinstance(bits, bool) or bits not in (4, 8):
            raise ConfigError(
                f"`model.quantize` got bits={bits!r:.40}, but they must be 4 or 8. Other formats are made on "
                "loading: `glmtune.load_model(source, quantization='int4-g64')`."
            )
        if self.in_place_quantizer is None:
            raise ConfigError(
                "`model.quantize` needs a model that `glmtune.load_model` loaded. Load it so, or with "
                f"`quantization='int{bits}'` at once."
            )
        check_not_held(cast(Any, self), "model.quantize")
        self.in_place_quantizer.quantize(self, bits)
        self.wants_products, self._has_products = True, False
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast as transformers does; a model that is split over devices is only cast.

        Raises:
            ConfigError: it is split; there is no such device here.
        """
        parse_to: Any = cast(Any, torch)._C._nn._parse_to  # as `nn.Module.to` (torch 2.13) reads arguments
        self._check_move(parse_to(*args, **kwargs)[0])
        parent: Any = super()
        return parent.to(*args, **kwargs)

    def cuda(self, device: int | torch.device | None = None) -> Any:
        """Move to a GPU as transformers does.

        Raises:
            ConfigError: see `to`.
        """
        self._check_move(torch.device("cuda" if device is None else device))
        parent: Any = super()
        return parent.cuda(device)

    def _check_move(self, device: torch.device | None) -> None:
        places = getattr(self, "hf_device_map", None)
        check_not_held(cast(Any, self), "model.to")
        if device is None:
            return
        if places is not None and len(set(places.values())) > 1:
            raise ConfigError(
                f"The model is split over {', '.join(sorted(set(places.values())))}, so it cannot be moved "
                "as a whole. Leave out `.to(...)` or `.cuda()`, or load it without `device_map`."
            )
        if device.type in ACCELERATORS:
            choose_device(device)  # PyTorch's own words for a device that is not there say nothing to do

    def keep_products(self) -> None:
        """Say that layers of codes have the fastest products now, and are to have them again after a move."""
        self.wants_products = self._has_products = True

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Cast or move as asked (`.half()`, `.to()`, `.cuda()`); products of codes are made anew after it."""
        parent: Any = super()
        self._has_products = False
        return parent._apply(fn, recurse)

    @property
    def quantization(self) -> str | None:
        """Method by which the weights were quantized, None for floating point ones."""
        layout = self.stored_layout or QuantizedLayout.of(self.config)
        return None if layout is None else layout.method

    def is_base(self, fingerprint: str) -> bool:
        """Say whether something trained on a base fits this one.

        Args:
            fingerprint: of that base.

        Returns:
            True for this model's own fingerprint, and for that of the weights it was quantized from.
        """
        layout = self.stored_layout or QuantizedLayout.of(self.config)
        return fingerprint == self.fingerprint() or (
            layout is not None and fingerprint == layout.source_fingerprint
        )

    @property
    def parent_is_unknown(self) -> bool:
        """Whether the weights are codes and nothing tells of which weights, as in the released INT4 files."""
        layout = self.stored_layout or QuantizedLayout.of(self.config)
        return layout is not None and not layout.source_fingerprint

    def fingerprint(self) -> str:
        """Identify the base model: architecture and weights; see `weights_fingerprint`.

        Prefixes or adapters attached to the model do not change it.

        Returns:
            64 hexadecimal digits.
        """
        named = self.named_parameters(remove_duplicate=False)  # a tied head has two names
        parameters = {_without_adapters(name): tensor for name, tensor in named}
        codes = {  # layers of codes may hold them and their scales in another order than their parameters
            f"{_without_adapters(name)}.{part}": partial(module.stored_tensor, part)
            for name, module in self.named_modules()
            if hasattr(module, "stored_tensor")
            for part in module._parameters
        }
        # Of layers that were rounded in memory, the weights are what prefixes and adapters name.
        rounded = {
            f"{_without_adapters(name)}.weight": module.source_signs
            for name, module in self.named_modules()
            if getattr(module, "source_signs", None) is not None
        }
        signs = {
            name: rounded.get(name) or sampled_signs(codes[name]() if name in codes else parameters[name])
            for name in fingerprinted_names(self.config)
        }
        return signs_fingerprint(self.config, signs)


def _without_adapters(name: str) -> str:
    return name.replace(".base_layer", "")  # the module into which PEFT moves a layer that it wraps


class OfficialChatGlmForCausalLM(OfficialModel, ChatGlmForCausalLM):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    """ChatGLM-6B that reads and writes official checkpoints, knows its release line and chats."""
