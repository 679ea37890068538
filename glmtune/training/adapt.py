"""Choose what of a model is trained (a prefix, low-rank adapters, everything) and how that part is kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from glmtune.errors import ConfigError
from glmtune.models.checkpoints.quantized_layout import without_layout
from glmtune.models.checkpoints.reading import read_into
from glmtune.models.checkpoints.writing import save_official
from glmtune.models.load import GlmModel, build_model, choose_device, load_config
from glmtune.models.placeholders import PendingWeights, pending_weights, set_pending_weights
from glmtune.models.releases.source import resolve_source
from glmtune.models.tokenizers.base import GlmTokenizer
from glmtune.prefix.attach import attach_prefix, freeze_base, without_prefix
from glmtune.prefix.checkpoint import PrefixMeta, load_prefix, save_prefix
from glmtune.prefix.encoder import PrefixEncoder
from glmtune.quantization.layers.linear import QuantizedEmbedding, QuantizedLinear
from glmtune.settings import check_choice
from glmtune.training.settings import LoraSettings

if TYPE_CHECKING:
    from peft import PeftModel

QUERY_KEY_VALUE = ("query_key_value", "q_proj", "k_proj", "v_proj")
"""Names of the layers that make queries, keys and values: one in ChatGLM-6B, three in later models."""


class Tuned(Protocol):
    """The part of a model that training changes, and how it is kept on disk."""

    @property
    def model(self) -> GlmModel | PeftModel:
        """The whole model, base included."""
        ...

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the tuned part into an existing folder.

        Args:
            folder: where to.
            weights: trained weights by parameter name, where the model's own are sharded over processes, or
                change while this writes.
        """
        ...

    def load(self, folder: Path) -> None:
        """Read the tuned part back from a folder that `save` filled, in place and bit by bit.

        The weights of a model of placeholders are not read here: the model takes note of the folder, and
        sharded loading reads them from there, tensor by tensor.

        Args:
            folder: a checkpoint of the run.
        """
        ...

    def base_alone(self) -> AbstractContextManager[None]:
        """Run a block with the base as it was before tuning."""
        ...


@dataclass(frozen=True)
class TunedPrefix:
    """A prefix over a frozen base.

    Attributes:
        model: the base, prefix attached.
        encoder: the prefix, float32.
        meta: what the file says of its origin.
    """

    model: GlmModel
    encoder: PrefixEncoder
    meta: PrefixMeta

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write ``prefix_encoder.safetensors``; see `Tuned.save`."""
        state = None
        if weights is not None:
            # Names in `weights` are those of the whole model, in a file those of the encoder alone.
            place = next(name for name, module in self.model.named_modules() if module is self.encoder)
            state = {name: weights[f"{place}.{name}"] for name, _ in self.encoder.named_parameters()}
        save_prefix(self.encoder, folder, meta=self.meta, state=state)

    def load(self, folder: Path) -> None:
        """Read the prefix back in place."""
        self.encoder.load_state_dict(load_prefix(folder, self.model).state_dict())

    def base_alone(self) -> AbstractContextManager[None]:
        """Run a block with the untuned base."""
        return without_prefix(self.model)


@dataclass(frozen=True)
class TunedModel:
    """All weights of a model, float32.

    Attributes:
        model: the model.
        tokenizer: written beside the weights, so that the folder is a complete checkpoint.
    """

    model: GlmModel
    tokenizer: GlmTokenizer

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write an official checkpoint; see `Tuned.save`."""
        save_official(self.model, folder, state_dict=weights)
        self.tokenizer.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Read the weights back in place; see `Tuned.load`."""
        if pending_weights(self.model) is None:
            read_into(self.model, folder, self.model.config)
        else:
            set_pending_weights(self.model, PendingWeights(folder, self.model.config))

    def base_alone(self) -> AbstractContextManager[None]:
        """Do nothing: before training the model is its own base."""
        return nullcontext()


@dataclass(frozen=True)
class TunedAdapter:
    """Low-rank adapters in a frozen base.

    Attributes:
        model: the base with adapters, as PEFT wraps it.
    """

    model: PeftModel

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json`` for PEFT; see `Tuned.save`."""
        state = None if weights is None else dict(weights)
        self.model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form; the run has a model card

    def load(self, folder: Path) -> None:
        """Read the adapters back in place."""
        from peft import set_peft_model_state_dict

        weights = load_file(folder / "adapter_model.safetensors")
        set_peft_model_state_dict(self.model, weights)

    def base_alone(self) -> AbstractContextManager[None]:
        """Run a block with the untuned base."""
        return self.model.disable_adapter()


def tune_adapter(model: GlmModel, settings: LoraSettings) -> TunedAdapter:
    """Add low-rank adapters, float32, and freeze everything else.

    Args:
        model: mutated.
        settings: rank, scale, dropout and the layers to adapt.

    Raises:
        ConfigError: a target is no linear layer of the model.
    """
    from peft import LoraConfig, get_peft_model

    layers = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    targets = settings.targets or [name for name in QUERY_KEY_VALUE if name in layers]
    for target in targets:
        check_choice("lora.targets", target, sorted(layers))
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # PEFT 0.21 asks for a property that transformers renamed
        adapted = cast("PeftModel", get_peft_model(model, config))
    adapted.peft_config["default"].base_model_name_or_path = model.source
    return TunedAdapter(adapted)


def tune_prefix(model: GlmModel, encoder: PrefixEncoder, meta: PrefixMeta) -> TunedPrefix:
    """Attach a new prefix and freeze everything else.

    Args:
        model: mutated.
        encoder: where training starts.
        meta: what every saved file will say of its origin.
    """
    attach_prefix(model, encoder)
    freeze_base(model)
    return TunedPrefix(model, encoder, meta)


def tune_all(model: GlmModel, tokenizer: GlmTokenizer) -> TunedModel:
    """Make every weight trainable, in float32 so that small updates are not rounded away.

    Args:
        model: mutated.
        tokenizer: saved with every checkpoint.

    Raises:
        ConfigError: the model is quantized.
    """
    if model.quantization is not None:
        raise ConfigError(
            f"`tune` is `full`, but `{model.source}` is quantized ({model.quantization}): codes cannot be "
            "trained. Tune a prefix or LoRA (`+recipe=ptuning`, `+recipe=lora`), or load unquantized weights."
        )
    model.float()
    model.requires_grad_(True)
    model.config.dtype = torch.float32  # what config.json of every checkpoint will say
    return TunedModel(model, tokenizer)


def fresh_model(
    source: str, *, device: str, family: str | None, initialize: Callable[[GlmModel], None] | None = None
) -> GlmModel:
    """Make a model with random weights from the config.json of a checkpoint folder, in float32.

    Embedding and head are one matrix while it is trained; a checkpoint holds it twice, as the releases do.

    Args:
        source: see ``glmtune.models.releases.source.resolve_source``; weights need not exist.
        device: ``auto``, ``cpu`` or ``cuda``.
        family: release line, None to detect it.
        initialize: changes the random weights before training, such as
            `glmtune.tiny.induction.teach_copying_where_it_fits`; None leaves them.
    """
    config = load_config(source, resolve_source(source), family)
    config.dtype = torch.float32
    without_layout(config)
    model = build_model(config)
    # One matrix reads and writes tokens, its rows of length 1 (so a std of 1/sqrt(hidden_size)): copying is
    # learnt once, not token by token.
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    nn.init.normal_(embedding.weight, std=config.hidden_size**-0.5)
    model.lm_head.weight = embedding.weight
    if initialize is not None:
        initialize(model)
    model.source = source
    nn.Module.to(model, device=choose_device(device), dtype=torch.float32)
    return model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers are trained, and how many there are in all; codes count as their weights."""
    sizes: dict[int, tuple[int, bool]] = {}
    for module in model.modules():
        bits = module.bits if isinstance(module, QuantizedLinear | QuantizedEmbedding) else None
        for name, weight in module.named_parameters(recurse=False):
            # Under ZeRO-3 a weight holds a part, or nothing; `ds_numel` is its size.
            size = getattr(weight, "ds_numel", weight.numel())
            if bits is not None and name != "bias":
                size = size * 8 // bits if name == "weight" else 0
            sizes[id(weight)] = size, weight.requires_grad
    counted = sizes.values()
    return sum(size for size, trained in counted if trained), sum(size for size, _ in counted)
