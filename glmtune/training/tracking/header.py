"""In words: what is about to be trained, and which commands follow a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtune.command_line import command_words, data_words, model_words
from glmtune.models.releases.families import MIXTURES
from glmtune.terminal.console import Console
from glmtune.training.distributed.parent import LAUNCHED, is_started

if TYPE_CHECKING:
    from glmtune.data.rows import RowSet
    from glmtune.retention.replay import Replay
    from glmtune.training.trainer import GlmTrainer

METHODS = {"prefix": "P-Tuning v2", "lora": "LoRA", "full": "all weights"}
# What is taken when nothing is named; said with the way to others, or a newcomer trains glm-tiny unawares.
EMBEDDED = "glm-tiny"
SHIPPED = "shipped:"


def intention(settings: Mapping[str, Any]) -> str:
    """Say in a sentence what `train` is about to do, before anything is loaded.

    Args:
        settings: all settings, nested plain values.
    """
    source, data = settings["model"]["source"], settings["data"]
    method = {"prefix": "P-Tuning v2 of", "lora": "LoRA on", "full": "Tuning of all weights of"}
    if settings.get("from_scratch"):
        method["full"] = "Training from random weights, in the shape of"
    rows = f" on {data['train_file']}" if data["train_file"] else ""
    preference = settings.get("preference")
    compared = f", by preference ({preference['loss']})" if preference else ""
    said = f"{method[settings['tune']]} {source}{rows}{compared}, into {settings['output_dir']}."
    if source == EMBEDDED and str(data["train_file"]).startswith(SHIPPED):
        said += (
            " Model and data are the embedded ones: for others add `model=NAME_OR_FOLDER` and "
            "`data=files data.train_file=FILE`; `+recipe=` says how to tune (`glmtune train --help`)."
        )
    return said


def announce(settings: Mapping[str, Any]) -> None:
    """Say the intention on the error stream, once: the launcher for all processes, or the first of them.

    Called before anything is loaded, since PyTorch alone takes seconds.

    Args:
        settings: all settings, nested plain values.
    """
    if is_started() and (LAUNCHED in os.environ or os.environ["RANK"] != "0"):
        return
    Console(stderr=True, highlight=False, soft_wrap=True).print(intention(settings), markup=False)


def header(trainer: GlmTrainer, settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is about to be trained, as names and values.

    Args:
        trainer: ready.
        settings: all settings, nested plain values.
    """
    from glmtune.training.adapt import count_parameters  # with PyTorch, which `intention` does without

    args, rows = trainer.args, trainer.rows
    trained, total = count_parameters(trainer.tuned.model)
    autocast = " with bf16 autocast" if args.bf16 else " with fp16 autocast" if args.fp16 else ""
    dtype = str(trainer.tuned.model.dtype).removeprefix("torch.")
    per_device, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    batch = per_device * accumulated * args.world_size
    num_rows = len(rows.train.lengths)
    held_out = "no rows" if rows.validation is None else f"{len(rows.validation.lengths):,} rows"
    many = "process" if args.world_size == 1 else "processes"
    replay = [] if trainer.replay is None else [("replay", _replay(trainer.replay))]
    return [
        ("model", f"{_model(settings['model'])}, {dtype}{autocast} on {args.device.type}"),
        ("trained", f"{_method(settings)}: {trained:,} of {total:,} parameters ({trained / total:.2%})"),
        ("data", _data(settings["data"], rows.train)),
        ("evaluation", f"{held_out} held out"),
        ("batch", f"{batch:,} rows = {per_device} x {accumulated} accumulated x {args.world_size} {many}"),
        *_preference(trainer),
        *replay,
        *_beyond_official(settings),
        ("steps", _steps(trainer, batch, num_rows)),
        ("folder", str(trainer.run_folder)),
    ]


def _data(settings: Mapping[str, Any], rows: RowSet) -> str:
    """Say which rows are learnt, and how many."""
    import numpy as np

    if rows.stream is not None:
        return f"{settings['train_file']}, streamed: {len(rows.lengths):,} rows in all steps"
    name = settings["train_file"] or " + ".join(part.name for part in rows.parts)
    return f"{name}: {len(rows.lengths):,} rows, {int(np.sum(rows.lengths, dtype=np.int64)):,} tokens"


def _beyond_official(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say what of a prefix run the official script does not have."""
    prefix = settings["prefix"]
    if settings["tune"] != "prefix" or prefix is None:
        return []
    named = {
        "prefix.switch=true": prefix.get("switch"),
        "prefix.gate=true": prefix.get("gate"),
        f"prefix.init={prefix.get('init')}": prefix.get("init", "random") != "random",
        "retain": settings.get("retain") is not None,
    }
    own = [name for name, is_set in named.items() if is_set]
    without = "+recipe=ptuning_official, +recipe=ptuning_chat_official"
    return [("not official", f"{', '.join(own)}; without: {without}")] if own else []


def _preference(trainer: GlmTrainer) -> list[tuple[str, str]]:
    """Say how answers are compared."""
    from glmtune.training.preference.trainer import PreferenceTrainer

    if not isinstance(trainer, PreferenceTrainer):
        return []
    against = {
        "base": "against the base: what is tuned, passed by",
        "start": "against the model as the run began",
        None: "without a reference",
    }[trainer.reference]
    return [("preference", f"{trainer.preference.loss}, beta {trainer.preference.beta:g}, {against}")]


def _replay(replay: Replay) -> str:
    """Say what is replayed beside a batch."""
    settings = replay.settings
    learnt = {"answers": "the base's answers", "kl": "the base's probabilities"}[settings.loss]
    known = {"shipped": "shipped prompts", "self": "prompts of its own"}
    asked = known.get(settings.prompts, f"the prompts of {settings.prompts}")
    return f"{replay.rows:,} general rows a step: {learnt} to {asked}, weight {settings.weight:g}"


def _model(model: Mapping[str, Any]) -> str:
    bits = model.get("quantization_bit")
    method = f"int{bits}" if bits else model.get("quantization")
    return f"{model['source']}, quantized to {method}" if method else str(model["source"])


def _method(settings: Mapping[str, Any]) -> str:
    method = METHODS[settings["tune"]]
    if settings["tune"] == "prefix":
        return f"{method}, {settings['prefix']['pre_seq_len']} positions"
    if settings["tune"] == "lora":
        return f"{method}, rank {settings['lora']['rank']}"
    return method


def _steps(trainer: GlmTrainer, batch: int, num_rows: int) -> str:
    """Say how many steps there are, and how often each row is seen; one of the two decides."""
    if trainer.args.max_steps > 0:
        return f"{trainer.args.max_steps:,} ({trainer.args.max_steps * batch / max(num_rows, 1):.3g} epochs)"
    epochs = trainer.args.num_train_epochs
    return f"about {max(1, round(epochs * num_rows / batch)):,} ({epochs:g} epochs)"


def next_commands(settings: Mapping[str, Any], run: Path, *, model_type: str = "chatglm") -> list[str]:
    """Return the commands that one types after a run, word for word.

    Args:
        settings: all settings, nested plain values.
        run: its folder.
        model_type: of the base: its releases' own code knows ``chatglm`` alone, and mixtures of experts
            cannot be exported.
    """
    tune, model, data = settings["tune"], model_words(settings["model"]), data_words(settings["data"])
    if tune == "full":
        own = {"model": str(run / "last")}
        return [command_words("predict", {**own, **data}), command_words("export", own)]
    name = "prefix_path" if tune == "prefix" else "adapter_path"
    tuned = {name: str(run), **model}
    if tune == "prefix" and settings["prefix"]["gate"]:  # which no other program can compute
        return [command_words("predict", {**tuned, **data}), command_words("chat", tuned)]
    if model_type in MIXTURES:
        return [command_words("predict", {**tuned, **data}), command_words("chat", tuned)]
    # Only whole weights have the form that transformers reads; a prefix goes with the official code.
    form = {"format": "official" if model_type == "chatglm" else "tuned"} if tune == "prefix" else {}
    exported = {key: value for key, value in tuned.items() if not key.startswith("quantization")}
    return [command_words("predict", {**tuned, **data}), command_words("export", {**exported, **form})]
