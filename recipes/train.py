"""Tune a model: load -> adapt -> data -> train -> save -> report."""

from __future__ import annotations

import dataclasses
import functools
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from glmtune.errors import ConfigError
from glmtune.planning.settings import PlanSettings
from glmtune.settings import as_given, as_written, setting
from glmtune.terminal.text import write_error
from glmtune.training.config import RunConfig
from recipes.words.compose import Command

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from evaluation.settings import BenchmarkSettings
    from glmtune.data.dataset import EncodedSplit
    from glmtune.data.rows import TrainingRows
    from glmtune.models.load import GlmModel
    from glmtune.models.tokenizers.base import GlmTokenizer
    from glmtune.retention.prompts import Prompt
    from glmtune.retention.replay import Replay
    from glmtune.retention.settings import RetentionSettings
    from glmtune.training.adapt import Tuned
    from glmtune.training.measuring.retention import RetentionMeasure
    from glmtune.training.starting.data import TrainSplit
    from glmtune.training.starting.switch_fitting import SwitchFitting
    from glmtune.training.trainer import GlmTrainer


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """What decides a run is in `RunConfig`: add new settings there, so that `glmtune plan` knows them too."""

    plan: PlanSettings = setting(PlanSettings, "what happens if the run cannot fit into memory")
    keep_chat_template: bool = setting(
        False, "copy on the chat template of the model (Jinja, which other tools run); tune=full"
    )

    def __post_init__(self) -> None:
        """Check the rules of a run, and that a template would be written.

        Raises:
            ConfigError: a value is not allowed, or two contradict each other.
        """
        super().__post_init__()
        if self.keep_chat_template and self.tune != "full":
            raise ConfigError(
                f"`keep_chat_template` is true, but `tune={self.tune}` writes no tokenizer. Leave it out."
            )


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
    with ExitStack() as held:
        return _run(config, held)


def _run(config: TrainConfig, held: ExitStack) -> TrainResult:
    from transformers import set_seed

    from glmtune.data import as_trained
    from glmtune.tracking.services import check_trackers
    from glmtune.training import session
    from glmtune.training.distributed import collectives, deepspeed_engine, sharded_loading
    from glmtune.training.starting.data import load_rows, training_rows
    from glmtune.training.starting.tuned_before import as_values, begin_with

    _refuse_fsdp_alone(config)
    device = _device(config.model.device)
    if config.deepspeed is not None:
        deepspeed_engine.prepare(config.deepspeed, device.type)
    settings = session.resolved(dataclasses.asdict(config))
    start = session.begin(config.output_dir, config.resume, settings, device, held)
    if start.finished is not None:
        return TrainResult(start.folder, start.finished["steps"], start.finished)
    check_trackers(config.trainer.report_to)
    # Before anything random: the first values of a prefix or adapters, and the packs, are of the seed.
    set_seed(config.seed)

    # What one process cannot read ends all: the others would wait for it in their first collective.
    with collectives.propagate_errors():
        model, tokenizer = _load(config, device)
        train, validation = load_rows(
            config, tokenizer, model.config.max_position_embeddings, start.checkpoint
        )
        prompts = _general_prompts(config)
    config = dataclasses.replace(config, data=train.settings)
    fingerprints = {
        "base_fingerprint": sharded_loading.base_fingerprint(model),
        "data_fingerprint": train.fingerprint,
    }
    trained_with = as_trained.record(train.settings, train.system, is_chat=train.is_chat)
    tuned = _adapt(config, model, tokenizer, fingerprints, trained_with)
    origin = {**as_values(begin_with(config, tuned, start.checkpoint)), as_trained.KEY: trained_with}
    rows = training_rows(config, train, validation, tokenizer)
    trainer = _trainer(config, tuned, tokenizer, rows, fingerprints, origin, device.type)
    trainer.switching = _switching(config, tokenizer, train, validation)
    with collectives.propagate_errors():
        retention = _retention(config, trainer, tokenizer, prompts, train, start.checkpoint)
    stopped_by = session.train(trainer, start, forced=config.resume == "force", retention=retention)
    if stopped_by is not None:
        return TrainResult(start.folder, trainer.state.global_step, {}, stopped_by)
    facts = {
        "train_path": as_given("data.train_file", train.path),
        "train_rows": len(train.lengths) if config.preference is None else len(rows.train.lengths),
        **fingerprints,
        **origin,
        "unseen": {split.split: split.unseen.values() for split in (train, validation) if split is not None},
        **_exam_verdict(config, trainer, retention),
    }
    return TrainResult(start.folder, trainer.state.global_step, session.report(trainer, settings, facts))


def _device(asked: str) -> torch.device:
    from glmtune.models.devices import choose_device, training_device

    device, other = training_device(asked), choose_device(asked).type
    if device.type != other:
        write_error(
            f"glmtune: training runs on the CPU, as a run on {other.upper()} could not be resumed with the "
            f"same random numbers. Add `model.device={other}` to train there all the same.\n"
        )
    return device


def _load(config: TrainConfig, chosen: torch.device) -> tuple[GlmModel, GlmTokenizer]:
    from glmtune.loading import load_base
    from glmtune.models.checkpoints.shards import verifying
    from glmtune.models.load import is_quantized
    from glmtune.models.other import check_tunable
    from glmtune.models.placeholders import load_placeholders
    from glmtune.models.releases.families import Family
    from glmtune.models.releases.source import resolve_source
    from glmtune.models.tokenizers.load import load_tokenizer_folder
    from glmtune.tiny.induction import teach_copying_where_it_fits
    from glmtune.training.adapt import fresh_model

    source = config.model.source
    # DeepSpeed moves the weights itself, each process's part to its GPU.
    device = str(chosen) if config.deepspeed is None else "cpu"
    if config.from_scratch:
        model = fresh_model(
            source, device=device, family=config.model.family, initialize=teach_copying_where_it_fits
        )
    # Placeholders: no process holds the whole base, each reads its shards once the trainer is there.
    elif config.loads_sharded and not is_quantized(source, config.model.family):
        dtype = "float32" if config.tune == "full" else config.model.dtype
        with verifying(config.model.verify_checksums):
            model = load_placeholders(source, dtype=dtype, family=config.model.family)
    else:
        model = load_base(
            source,
            dtype=config.model.dtype,
            device=device,
            family=config.model.family,
            quantization=config.model.method,
            quantization_embeddings=config.model.quantization_embeddings,
            verify_checksums=config.model.verify_checksums,
        )
        if (quantized := getattr(model, "quantization", None)) is not None:
            weight: Any = model.get_input_embeddings().weight
            is_outer = not weight.is_floating_point()
            config.check_division(f"`{source}` is quantized ({quantized})", has_outer_codes=is_outer)
    check_tunable(model, config.tune)
    if config.data.packing and model.family is Family.CHATGLM:
        raise ConfigError(
            f"`data.packing` is true, but `model.source` is `{source}`, a ChatGLM-6B: its positions tell "
            "where a context ends, so they cannot keep packed samples apart. Add `data.packing=false`."
        )
    tokenizer = load_tokenizer_folder(
        resolve_source(source), model.family, keep_chat_template=config.keep_chat_template
    )
    return model, tokenizer


def _adapt(
    config: TrainConfig,
    model: GlmModel,
    tokenizer: GlmTokenizer,
    fingerprints: dict[str, str],
    trained_with: dict[str, Any],
) -> Tuned:
    import json

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
    meta = PrefixMeta(
        base_source=config.model.described,
        template=template,
        trained_with=json.dumps(trained_with, ensure_ascii=False),
        **fingerprints,
    )
    return tune_prefix(model, encoder, meta)


def _trainer(
    config: TrainConfig,
    tuned: Tuned,
    tokenizer: GlmTokenizer,
    rows: TrainingRows,
    fingerprints: dict[str, str],
    origin: dict[str, Any],
    device: str,
) -> GlmTrainer:
    from glmtune.models.architectures.compiling import compile_layers
    from glmtune.training.arguments import compute_precision, training_arguments
    from glmtune.training.distributed.deepspeed_settings import deepspeed_config
    from glmtune.training.preference.trainer import PreferenceTrainer
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
    make = GlmTrainer
    if config.preference is not None:
        make = functools.partial(PreferenceTrainer, preference=config.preference, reference=config.reference)
    return make(
        tuned,
        arguments,
        config.trainer,
        rows,
        replay=_replay(config, arguments, tokenizer),
        uses_fsdp2=config.distributed == "fsdp",
        fingerprints=fingerprints,
        origin=origin,
    )


def _switching(
    config: TrainConfig,
    tokenizer: GlmTokenizer,
    train: TrainSplit,
    validation: EncodedSplit | None,
) -> SwitchFitting | None:
    from glmtune.data.dataset import EncodedSplit
    from glmtune.switch.fit import MIN_PROMPTS
    from glmtune.training.distributed import collectives
    from glmtune.training.starting.switch_fitting import SwitchFitting

    settings = config.prefix or config.lora
    if settings is None or not settings.switch:
        return None
    if not isinstance(train, EncodedSplit):
        if collectives.is_main_process():
            write_error(
                "glmtune: no switch is learnt: rows are streamed, and it needs prompts of all."
                " What is tuned applies to every request.\n"
            )
        return None
    if (count := len(train.lengths)) < MIN_PROMPTS:  # no error: a recipe asks for the switch by default
        if collectives.is_main_process():
            write_error(
                f"glmtune: no switch is learnt: {count} rows are too few to tell the task's prompts from "
                f"others by ({MIN_PROMPTS} at least). What is tuned applies to every request.\n"
            )
        return None
    return SwitchFitting(settings, tokenizer, train, validation, config.retain)


def _replay(config: TrainConfig, arguments: TrainingArguments, tokenizer: GlmTokenizer) -> Replay | None:
    from glmtune.retention.replay import Replay

    if config.retain is None:
        return None
    accumulation, processes = arguments.gradient_accumulation_steps, arguments.world_size
    return Replay(
        config.retain,
        rows_per_step=arguments.per_device_train_batch_size * accumulation * processes,
        accumulation=accumulation,
        seed=config.seed,
        tokenizer=tokenizer,
        rank=arguments.process_index,
        num_processes=processes,
    )


def _general_prompts(config: TrainConfig) -> list[Prompt]:
    """Read what retention is measured by; empty where nothing is."""
    from glmtune.retention.prompts import load_prompts
    from glmtune.training.distributed import collectives

    settings = config.retention
    if settings is None:
        return []
    if config.from_scratch:
        if collectives.is_main_process():
            write_error(
                "glmtune: retention is not measured: random weights answer nothing that could be kept.\n"
            )
        return []
    return load_prompts(settings.prompts, shipped="retention", limit=settings.num_prompts)


def _retention(
    config: TrainConfig,
    trainer: GlmTrainer,
    tokenizer: GlmTokenizer,
    prompts: list[Prompt],
    train: TrainSplit,
    checkpoint: Path | None,
) -> RetentionMeasure | None:
    """Have the trainer measure retention, and the base asked the exam; None where nothing is measured."""
    from glmtune.training.measuring.files import EXAM, RETENTION
    from glmtune.training.measuring.retention import RetentionMeasure

    settings = config.retention
    if settings is None or not prompts:
        return None
    measure = RetentionMeasure(trainer, settings, tokenizer, prompts, train.rows, checkpoint)
    if settings.exam is None:
        return measure
    if config.shards_weights:
        _say_how_to_ask(config, trainer)
        return measure
    from evaluation.compare.kept import Exam

    measure.exam = Exam(
        _exam_settings(settings),
        trainer.run_folder / RETENTION / EXAM,
        cast(Any, trainer.tuned.model),  # PEFT's wrapper, too
        tokenizer,
        name=config.model.source,
        wait_seconds=config.launch.timeout_seconds,
    )
    return measure


def _exam_settings(settings: RetentionSettings) -> BenchmarkSettings:
    from evaluation.settings import BenchmarkSettings

    assert settings.exam is not None
    return BenchmarkSettings(name=settings.exam, limit=settings.exam_limit)


def _say_how_to_ask(config: TrainConfig, trainer: GlmTrainer) -> None:
    """Say that nobody holds the weights an exam would be asked of, and how to ask it afterwards."""
    from evaluation.compare.kept import ways_to_ask
    from glmtune.command_line import model_words
    from glmtune.training.distributed import collectives

    assert config.retention is not None
    if not collectives.is_main_process():
        return
    values = as_written(dataclasses.asdict(config))["model"]
    last = str(trainer.run_folder / "last")
    tuned = {"prefix": {"prefix_path": last}, "lora": {"adapter_path": last}, "full": {"model": last}}
    ways = ways_to_ask(model_words(values), tuned[config.tune], _exam_settings(config.retention))
    write_error(
        "glmtune: `retention.exam` is not asked: each process holds a part of the weights only. Ask when the "
        f"run is over, and compare the two:\n  {ways[0]}\n  {ways[1]}\n"
    )


def _exam_verdict(
    config: TrainConfig, trainer: GlmTrainer, retention: RetentionMeasure | None
) -> dict[str, Any]:
    """Ask the tuned model the exam, and say what it kept; a collective."""
    from evaluation.compare.kept import Exam
    from glmtune.training.distributed import collectives

    exam = None if retention is None else retention.exam
    if retention is None or not isinstance(exam, Exam):
        return {}
    with retention.asking(), trainer.tuned.obeying_switch():
        kept = exam.ask_tuned(trainer.state.global_step)
    collectives.barrier()
    return {} if kept is None else {"retention_exam": dataclasses.asdict(kept)}


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
        write_error(f"glmtune: this run may run out of memory. {warning}\n")


def _main(config: TrainConfig) -> int:
    """Run, or start the processes that do; exit as shells expect after a signal: 128 + its number."""
    from glmtune.training.distributed.parent import is_started
    from glmtune.training.distributed.start import start
    from glmtune.training.tracking.header import announce

    # As given, references and all: the processes have this environment, and a file needs none of it.
    values, device = as_written(dataclasses.asdict(config)), config.model.device
    announce(values)
    if not is_started():
        _check_memory(config)
        always = config.deepspeed is not None
        code = start("train", values, config.launch, device=device, always=always)
        if code is not None:
            return code
    result = run(config)
    return 0 if result.stopped_by is None else 128 + result.stopped_by


COMMAND = Command(
    name="train",
    summary="Tune a model: P-Tuning v2 (+recipe=ptuning), LoRA (+recipe=lora) or all weights (+recipe=full).",
    schema=TrainConfig,
    run=_main,
    examples=(
        "glmtune train +recipe=ptuning",
        "glmtune train +recipe=ptuning data=adgen model=chatglm2-6b",
        "glmtune train +recipe=ptuning_chat data.train_file=my_chats.jsonl",
        "glmtune train +recipe=full data=files data.train_file=my.json",
        "glmtune train +recipe=ptuning prefix_path=runs/old data.train_file=new.jsonl output_dir=runs/new",
        "glmtune train +recipe=full deepspeed=zero2 model=chatglm2-6b",
        "glmtune train +recipe=dpo",
        "glmtune train +recipe=dpo_lora preference=kto",
    ),
)
