"""Tune a model: load -> adapt -> data -> train -> save -> report."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from glmtune.errors import ConfigError
from glmtune.planning.settings import PlanSettings
from glmtune.settings import setting
from glmtune.training.config import RunConfig
from recipes.compose import Command

if TYPE_CHECKING:
    from glmtune.data.dataset import EncodedSplit
    from glmtune.data.rows import TrainingRows
    from glmtune.models.load import GlmModel
    from glmtune.models.tokenizers.base import GlmTokenizer
    from glmtune.training.adapt import Tuned
    from glmtune.training.trainer import GlmTrainer


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """What decides a run is in `RunConfig`: add new settings there, so that `glmtune plan` knows them too."""

    plan: PlanSettings = setting(PlanSettings, "what happens if the run cannot fit into memory")


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        output_dir: the run folder.
        steps: optimizer steps of the whole run, earlier sessions included.
        results: content of ``all_results.json``; empty when a signal stopped the run.
        stopped_by: number of that signal, None if the run came to its end.
    """

    output_dir: Path
    steps: int
    results: dict[str, Any]
    stopped_by: int | None = None


def run(config: TrainConfig) -> TrainResult:
    """Train, or go on with a run that was stopped.

    Args:
        config: all settings.

    Returns:
        Where the results are and what they say.

    Raises:
        GlmtuneError: settings, data, checkpoint or training cannot be used; the message says what to do.
    """
    from transformers import set_seed

    from glmtune.models.load import choose_device
    from glmtune.training import session
    from glmtune.training.distributed import collectives, deepspeed_engine, sharded_loading

    _refuse_fsdp_alone(config)
    device = choose_device(config.model.device)
    if config.deepspeed is not None:
        deepspeed_engine.prepare(config.deepspeed, device.type)
    settings = session.resolved(dataclasses.asdict(config))
    start = session.begin(config.output_dir, config.resume, settings, device)
    if start.finished is not None:
        return TrainResult(start.folder, start.finished["steps"], start.finished)
    # Before anything random: the first values of a prefix or adapters, and the packs, are of the seed.
    set_seed(config.seed)

    # What one process cannot read ends all: the others would wait for it in their first collective.
    with collectives.propagate_errors():
        model, tokenizer = _load(config)
        train, validation = _data(config, tokenizer)
    fingerprints = {
        "base_fingerprint": sharded_loading.base_fingerprint(model),
        "data_fingerprint": train.fingerprint,
    }
    tuned = _adapt(config, model, tokenizer, fingerprints)
    rows = _rows(config, train, validation, tokenizer)
    trainer = _trainer(config, tuned, rows, fingerprints, device.type)
    tensorboard = "tensorboard" in config.trainer.report_to
    stopped_by = session.train(trainer, start.checkpoint, tensorboard=tensorboard)
    if stopped_by is not None:
        return TrainResult(start.folder, trainer.state.global_step, {}, stopped_by)
    origin = {"train_path": train.path, "train_rows": len(train.lengths), **fingerprints}
    return TrainResult(start.folder, trainer.state.global_step, session.report(trainer, settings, origin))


def _load(config: TrainConfig) -> tuple[GlmModel, GlmTokenizer]:
    from glmtune.loading import load_base
    from glmtune.models.load import is_quantized
    from glmtune.models.placeholders import load_placeholders
    from glmtune.models.releases.families import Family
    from glmtune.models.releases.source import resolve_source
    from glmtune.models.tokenizers.load import load_tokenizer_folder
    from glmtune.tiny.induction import teach_copying_where_it_fits
    from glmtune.training.adapt import fresh_model

    source = config.model.source
    # DeepSpeed moves the weights itself, each process's part to its GPU.
    device = config.model.device if config.deepspeed is None else "cpu"
    if config.from_scratch:
        model = fresh_model(
            source, device=device, family=config.model.family, initialize=teach_copying_where_it_fits
        )
    # Placeholders: no process holds the whole base, each reads its shards once the trainer is there.
    elif config.loads_sharded and not is_quantized(source, config.model.family):
        dtype = "float32" if config.tune == "full" else config.model.dtype
        model = load_placeholders(source, dtype=dtype, family=config.model.family)
    else:
        model = load_base(
            source,
            dtype=config.model.dtype,
            device=device,
            family=config.model.family,
            quantization=config.model.method,
        )
    if config.data.packing and model.family is Family.CHATGLM:
        raise ConfigError(
            f"`data.packing` is true, but `model.source` is `{source}`, a ChatGLM-6B: its positions tell "
            "where a context ends, so they cannot keep packed samples apart. Add `data.packing=false`."
        )
    return model, load_tokenizer_folder(resolve_source(source), model.family)


def _data(config: TrainConfig, tokenizer: GlmTokenizer) -> tuple[EncodedSplit, EncodedSplit | None]:
    from glmtune.data.dataset import load_split
    from glmtune.tiny.generated import resolve_generated

    data = dataclasses.replace(
        config.data,
        train_file=resolve_generated(config.data.train_file),
        validation_file=resolve_generated(config.data.validation_file),
    )
    train = load_split(data, "train", tokenizer, progress=True)
    has_validation = data.validation_file is not None
    return train, load_split(data, "validation", tokenizer) if has_validation else None


def _adapt(
    config: TrainConfig, model: GlmModel, tokenizer: GlmTokenizer, fingerprints: dict[str, str]
) -> Tuned:
    from glmtune.models.templates.renderer import template_for
    from glmtune.prefix.checkpoint import PrefixMeta
    from glmtune.prefix.init import build_prefix_encoder
    from glmtune.training.adapt import tune_adapter, tune_all, tune_prefix

    if config.tune == "full":
        return tune_all(model, tokenizer)
    if config.lora is not None:
        return tune_adapter(model, config.lora)
    assert config.prefix is not None
    encoder = build_prefix_encoder(model, config.prefix, tokenizer)
    template = template_for(tokenizer).name
    meta = PrefixMeta(base_source=config.model.described, template=template, **fingerprints)
    return tune_prefix(model, encoder, meta)


def _rows(
    config: TrainConfig, train: EncodedSplit, validation: EncodedSplit | None, tokenizer: GlmTokenizer
) -> TrainingRows:
    from glmtune.data.collate import DynamicPaddingCollator, PackingCollator
    from glmtune.data.rows import TrainingRows, row_set

    collator = PackingCollator if config.data.packing else DynamicPaddingCollator
    return TrainingRows(
        train=row_set(train, config.data, seed=config.seed),
        validation=None if validation is None else row_set(validation, config.data, seed=config.seed),
        collator=collator(cast(int, tokenizer.pad_token_id), config.data.pad_to_multiple_of),
    )


def _trainer(
    config: TrainConfig, tuned: Tuned, rows: TrainingRows, fingerprints: dict[str, str], device: str
) -> GlmTrainer:
    from glmtune.models.architectures.compiling import compile_layers
    from glmtune.training.arguments import compute_precision, training_arguments
    from glmtune.training.distributed.deepspeed_settings import deepspeed_config
    from glmtune.training.trainer import GlmTrainer

    zero = config.deepspeed
    precision = compute_precision(
        config.trainer, tune=config.tune, dtype=tuned.model.dtype, device=device, zero=zero is not None
    )
    if config.trainer.torch_compile:
        compile_layers(tuned.model)
    arguments = training_arguments(
        config.trainer,
        output_dir=Path(config.output_dir).expanduser(),
        seed=config.seed,
        device=device,
        autocast=precision,
        evaluates=rows.validation is not None,
        deepspeed=None
        if zero is None
        else deepspeed_config(zero, config.trainer, precision=precision, has_gpu=device == "cuda"),
        timeout_seconds=config.launch.timeout_seconds,
    )
    return GlmTrainer(
        tuned,
        arguments,
        config.trainer,
        rows,
        uses_fsdp2=config.distributed == "fsdp",
        fingerprints=fingerprints,
    )


def _refuse_fsdp_alone(config: TrainConfig) -> None:
    """Refuse FSDP in a single process, which would shard the weights over itself."""
    if config.distributed == "fsdp" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise ConfigError(
            "`distributed` is `fsdp`, but this run has one process, and so nobody to share the weights with. "
            "Add `launch.num_processes=N`, one for every GPU, or leave `distributed` out."
        )


def _check_memory(config: TrainConfig) -> None:
    """Warn of a run that cannot fit, or refuse it (``plan.enforce``)."""
    from glmtune.planning.check import check_run

    if warning := check_run(config, config.plan):
        sys.stderr.write(f"glmtune: this run may run out of memory. {warning}\n")


def _main(config: TrainConfig) -> int:
    """Run, or start the processes that do; exit as shells expect after a signal: 128 + its number."""
    from glmtune.training.distributed.launch import is_started
    from glmtune.training.distributed.start import start

    if not is_started():
        _check_memory(config)
        always = config.deepspeed is not None
        values, device = dataclasses.asdict(config), config.model.device
        code = start("train", values, config.launch, device=device, always=always)
        if code is not None:
            return code
    result = run(config)
    return 0 if result.stopped_by is None else 128 + result.stopped_by


COMMAND = Command(
    name="train",
    summary="Tune a model: P-Tuning v2 (+recipe=ptuning) or all its weights (+recipe=full).",
    schema=TrainConfig,
    run=_main,
    examples=(
        "glmtune train +recipe=ptuning",
        "glmtune train +recipe=ptuning data=adgen model=chatglm2-6b",
        "glmtune train +recipe=ptuning_chat data.train_file=my_chats.jsonl",
        "glmtune train +recipe=full data=files data.train_file=my.json",
        "glmtune train +recipe=full deepspeed=zero2 model=chatglm2-6b",
    ),
)
