"""Choose what of a model is trained (a prefix, low-rank adapters, everything) and how that part is kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from glmtune.adapter import fitting_weights
from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.checkpoints.finite import check_savable
from glmtune.models.checkpoints.quantized_layout import without_layout
from glmtune.models.checkpoints.reading import check_records, read_into
from glmtune.models.checkpoints.shards import read_records
from glmtune.models.checkpoints.sizes import check_memory
from glmtune.models.checkpoints.writing import save_official
from glmtune.models.devices import choose_device
from glmtune.models.generation import release_generation
from glmtune.models.load import GlmModel, build_model, load_config
from glmtune.models.placeholders import PendingWeights, pending_weights, set_pending_weights
from glmtune.models.releases.source import resolve_source
from glmtune.models.tokenizers.base import GlmTokenizer
from glmtune.prefix.attach import attach_prefix, freeze_base, without_prefix
from glmtune.prefix.checkpoint import PrefixMeta, load_prefix, save_prefix
from glmtune.prefix.encoder import PrefixEncoder, describe_shape
from glmtune.quantization.layers.linear import QuantizedEmbedding, QuantizedLinear
from glmtune.settings import check_choice
from glmtune.switch.files import read_switch, save_switch
from glmtune.switch.model import attach_switch, detach_switch
from glmtune.switch.rule import Switch
from glmtune.training.settings import LoraSettings

if TYPE_CHECKING:
    from peft import PeftModel

QUERY_KEY_VALUE = ("query_key_value", "q_proj", "k_proj", "v_proj", "q_a_proj", "q_b_proj", "kv_b_proj")
"""Names of the layers that make queries, keys and values: one in ChatGLM-6B, three in later models, and in
`glm4_moe_lite` those that widen what its attention keeps small."""


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

        Raises:
            CheckpointError: they are not finite; nothing is written.
        """
        ...

    def load(self, folder: Path) -> None:
        """Read the tuned part back from a folder that `save` filled, in place and bit by bit.

        The weights of a model of placeholders are not read here: the model takes note of the folder, and
        sharded loading reads them from there, tensor by tensor.

        Args:
            folder: a checkpoint of the run.

        Raises:
            CheckpointError: see `check`.
        """
        ...

    def check(self, folder: Path) -> None:
        """Make sure that `load` would find what it needs; nothing changes.

        Args:
            folder: a checkpoint.

        Raises:
            CheckpointError: it holds no such part, or one of another shape.
        """
        ...

    def base_alone(self) -> AbstractContextManager[None]:
        """Run a block with the base as it was before tuning."""
        ...

    def saved_switch(self, folder: Path) -> Switch | None:
        """Return the switch that `save` wrote into a folder, None where there is none.

        Args:
            folder: a checkpoint of the run.

        Raises:
            CheckpointError: it is damaged.
        """
        ...

    def obeying_switch(self) -> AbstractContextManager[None]:
        """Run a block that asks the model as users will: its switch decides for every prompt.

        Nothing else may be trained or evaluated meanwhile. Without a switch nothing changes.
        """
        ...

    def bypassed(self) -> AbstractContextManager[dict[str, Any]]:
        """Let forward passes of a block be the base's while the model stays as it is built.

        For the middle of a training step: hooks, modules and what is trained are untouched, as DDP, ZeRO,
        FSDP and compiled code hold on to them.

        Yields:
            Keywords to give to every forward pass.
        """
        ...


@dataclass
class TunedPrefix:
    """A prefix over a frozen base.

    Attributes:
        model: the base, prefix attached.
        encoder: the prefix, float32.
        meta: what the file says of its origin.
        switch: saved with it. The encoder itself has none in training, where all is computed as if the prefix
            applied to every prompt.
    """

    model: GlmModel
    encoder: PrefixEncoder
    meta: PrefixMeta
    switch: Switch | None = None

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write ``prefix_encoder.safetensors``; see `Tuned.save`."""
        state = None
        if weights is not None:
            # Names in `weights` are those of the whole model, in a file those of the encoder alone.
            place = next(name for name, module in self.model.named_modules() if module is self.encoder)
            state = {name: weights[f"{place}.{name}"] for name, _ in self.encoder.named_parameters()}
        save_prefix(self.encoder, folder, meta=self.meta, state=state, switch=self.switch)

    def load(self, folder: Path) -> None:
        """Read the prefix back in place; see `Tuned.load`."""
        self.encoder.load_state_dict(self._saved(folder).state_dict())

    def check(self, folder: Path) -> None:
        """Compare lengths and projections; see `Tuned.check`."""
        self._saved(folder)

    def saved_switch(self, folder: Path) -> Switch | None:
        """Read it from the prefix' file; see `Tuned.saved_switch`."""
        return load_prefix(folder, self.model).switch

    def _saved(self, folder: Path) -> PrefixEncoder:
        saved = load_prefix(folder, self.model)
        before, now = (
            {name: tuple(weight.shape) for name, weight in encoder.state_dict().items()}
            for encoder in (saved, self.encoder)
        )
        if before != now:
            raise CheckpointError(
                f"{folder} holds {describe_shape(saved)}, but the run has {describe_shape(self.encoder)}. Go "
                "on with the settings it was made with, or begin a new run from it: `prefix_path=` and "
                "another `output_dir`."
            )
        return saved

    def base_alone(self) -> AbstractContextManager[None]:
        """Run a block with the untuned base."""
        return without_prefix(self.model)

    @contextmanager
    def obeying_switch(self) -> Generator[None]:
        """Give the encoder its switch for a block; see `Tuned.obeying_switch`."""
        before, self.encoder.switch = self.encoder.switch, self.switch
        try:
            yield
        finally:
            self.encoder.switch = before

    def bypassed(self) -> AbstractContextManager[dict[str, Any]]:
        """Give the prefix no strength, so that its hook passes it by; see `Tuned.bypassed`."""
        return nullcontext({"prefix_strength": 0.0})


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
        check_savable(folder, (self.model.state_dict() if weights is None else weights).items())
        save_official(self.model, folder, state_dict=weights)
        if self.model.generation_config is not None:  # where its answers end, and how the release samples
            self.model.generation_config.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Read the weights back in place; see `Tuned.load`."""
        if pending_weights(self.model) is None:
            read_into(self.model, folder, self.model.config)
        else:
            set_pending_weights(self.model, PendingWeights(folder, self.model.config))

    def check(self, folder: Path) -> None:
        """Compare the tensors with the model's, by the headers of the files; see `Tuned.check`."""
        check_records(read_records(folder), self.model.config, folder)

    def base_alone(self) -> AbstractContextManager[None]:
        """Do nothing: before training the model is its own base."""
        return nullcontext()

    def saved_switch(self, folder: Path) -> Switch | None:
        """Return None: there is no base left that could answer instead."""
        return None

    def obeying_switch(self) -> AbstractContextManager[None]:
        """Do nothing: there is no switch."""
        return nullcontext()

    def bypassed(self) -> AbstractContextManager[dict[str, Any]]:
        """Refuse: the base is what is trained.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "`tune` is `full`, so once training has begun there is no base to compare with: its weights are "
            "those being trained. Use `retain.loss=answers`."
        )


@dataclass
class TunedAdapter:
    """Low-rank adapters in a frozen base.

    Attributes:
        model: the base with adapters, as PEFT wraps it.
        switch: saved with them.
    """

    model: PeftModel
    switch: Switch | None = None

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json`` for PEFT; see `Tuned.save`."""
        state = None if weights is None else dict(weights)
        trained = ((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad)
        check_savable(folder, trained if state is None else state.items())
        self.model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
        if self.switch is not None:
            save_switch(self.switch, folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form; the run has a model card

    def load(self, folder: Path) -> None:
        """Read the adapters back in place; see `Tuned.load`."""
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self.model, fitting_weights(folder, self.model))

    def check(self, folder: Path) -> None:
        """Compare layers and ranks; see `Tuned.check`."""
        fitting_weights(folder, self.model)

    def saved_switch(self, folder: Path) -> Switch | None:
        """Read it from its own file; see `Tuned.saved_switch`."""
        return read_switch(folder)

    def base_alone(self) -> AbstractContextManager[None]:
        """Run a block with the untuned base."""
        return self.model.disable_adapter()

    @contextmanager
    def obeying_switch(self) -> Generator[None]:
        """Attach the switch to the adapted layers for a block; see `Tuned.obeying_switch`."""
        if self.switch is None:
            yield
            return
        attach_switch(self.model, self.switch)
        try:
            yield
        finally:
            detach_switch(self.model)

    @contextmanager
    def bypassed(self) -> Generator[dict[str, Any]]:
        """Set the mark that adapted layers obey; see `Tuned.bypassed`.

        Not by PEFT's `disable_adapter`, which also stops the adapters from being trained and starts them
        again: in the middle of a step DDP and FSDP must not see that.
        """
        layers: list[Any] = [layer for layer in self.model.modules() if hasattr(layer, "_disable_adapters")]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield {}
        finally:
            for layer in layers:
                layer._disable_adapters = False


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
        # PEFT 0.21 asks for a property that transformers renamed.
        warnings.simplefilter("ignore", FutureWarning)
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
        ).see("codes")
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
        device: as in `choose_device`.
        family: release line, None to detect it.
        initialize: changes the random weights before training, such as
            `glmtune.tiny.induction.teach_copying_where_it_fits`; None leaves them.
    """
    folder = resolve_source(source)
    config = load_config(source, folder, family)
    config.dtype = torch.float32
    without_layout(config)
    check_memory(config, source)
    model = build_model(config)
    # One matrix reads and writes tokens, its rows of length 1 (so a std of 1/sqrt(hidden_size)): copying is
    # learnt once, not token by token.
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    nn.init.normal_(embedding.weight, std=config.hidden_size**-0.5)
    model.lm_head.weight = embedding.weight
    if initialize is not None:
        initialize(model)
    model.source = source
    model.generation_config = release_generation(folder, config)
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
