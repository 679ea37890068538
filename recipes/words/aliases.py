"""Names of the official scripts, of `TrainingArguments` and of other trainers, and what they mean here.

A name that one setting alone ends with (`learning_rate`, `pre_seq_len`, `train_file`) needs no entry: see
`recipes.words.reading`. No entry may hide a setting of ours; a test holds the table to that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

NOTHING: Mapping[str, str] = {}


class Alias(NamedTuple):
    """What one name means.

    Attributes:
        to: settings or groups that it stands for; the first that the command has.
        values: words that stand for it and one value (in lower case); no words: that is so anyhow.
        needless: why nothing has to be written, whatever the value.
        refused: what to write instead, or why it cannot be.
        own: the commands in which it is needless, where others refuse it.
    """

    to: tuple[str, ...] = ()
    values: Mapping[str, str] = NOTHING
    needless: str = ""
    refused: str = ""
    own: tuple[str, ...] = ()


def _renamed(names: Mapping[str, str]) -> dict[str, Alias]:
    """Read `names: setting [setting of another command]`, several names separated by blanks."""
    return {name: Alias(tuple(to.split())) for several, to in names.items() for name in several.split()}


def _needless(names: Mapping[str, str]) -> dict[str, Alias]:
    return {name: Alias(needless=why) for several, why in names.items() for name in several.split()}


def _refused(names: Mapping[str, str]) -> dict[str, Alias]:
    return {name: Alias(refused=why) for several, why in names.items() for name in several.split()}


_RENAMED = _renamed(
    {
        # the model, and what was tuned before
        "model_name_or_path model_name model_path base_model pretrained_model_name_or_path": "model",
        "ptuning_checkpoint prefix_checkpoint": "prefix_path",
        "adapter_name_or_path lora_path lora_checkpoint peft_model_path": "adapter_path",
        "num_virtual_tokens prefix_length": "prefix.pre_seq_len pre_seq_len",
        "device": "model.device",
        "dtype torch_dtype": "model.dtype",
        "family": "model.family",
        "quant_method": "quantization.method model.quantization",
        "quantization_embeddings": "quantization.embeddings",  # of `quantize`; others have it of the model
        # the rows
        "train_data train_data_path train_path data_path dataset_path": "data.train_file",
        "val_file valid_file eval_file dev_file val_data eval_data": "data.validation_file",
        "test_data predict_file": "data.test_file",
        "dataset dataset_name": "data benchmark",
        "dataset_config_name": "data.hub_subset",
        "dataset_dir": "data.dir",
        "layout": "data.layout",
        "packing": "data.packing",
        "input_column question_column": "data.prompt_column",
        "output_column answer_column": "data.response_column",
        # how it is trained
        "lr": "trainer.learning_rate",
        "steps num_steps total_steps max_train_steps": "trainer.max_steps",
        "batch_size bs micro_batch_size per_device_batch_size per_gpu_train_batch_size": (
            "trainer.per_device_train_batch_size generation.batch_size engine.batch_size"
        ),
        "per_device_eval_batch_size": (
            "trainer.per_device_eval_batch_size generation.batch_size engine.batch_size"
        ),
        "eval_batch_size per_gpu_eval_batch_size": (
            "trainer.per_device_eval_batch_size generation.batch_size engine.batch_size"
        ),
        "grad_accum accumulation_steps gradient_accumulation": "trainer.gradient_accumulation_steps",
        "optim optimizer": "trainer.optim",
        "scheduler lr_scheduler scheduler_type": "trainer.lr_scheduler_type",
        "warmup": "trainer.warmup_steps",
        "wd": "trainer.weight_decay",
        "beta1": "trainer.adam_beta1",
        "beta2": "trainer.adam_beta2",
        "clip_grad gradient_clipping grad_clip": "trainer.max_grad_norm",
        "precision mixed_precision": "trainer.precision",
        "shuffle": "trainer.shuffle",
        "activation_checkpointing": "trainer.gradient_checkpointing",
        "log_steps log_interval": "trainer.logging_steps",
        "save_interval": "trainer.save_steps",
        "eval_interval": "trainer.eval_steps",
        "num_workers": "trainer.dataloader_num_workers",
        "gpus num_gpus nproc_per_node": "launch.num_processes",
        "nnodes": "launch.num_nodes",
        "ddp_timeout": "launch.timeout_seconds",
        "lora_r lora_rank rank": "lora.rank",
        "lora_alpha alpha": "lora.alpha",
        "lora_dropout": "lora.dropout",
        "lora_target lora_targets lora_target_modules target_modules": "lora.targets",
        # answers and evaluation
        "task tasks": "benchmark",
        "benchmark": "benchmark_file",  # of `data check`, which has no such group
        "limit": "benchmark.limit",
        "subjects": "benchmark.subjects",
        "num_shots shots few_shot": "benchmark.num_fewshot",
        "api_base openai_api_base": "endpoint.base_url url",
        # where it goes
        "output out output_path out_dir save_dir": "output_dir",
    }
)
_SWITCHES = {
    "fp16": Alias(
        values={"true": "trainer.precision=fp16", "false": ""},
        refused="`trainer.precision=fp16` or not",
    ),
    "bf16": Alias(
        values={"true": "trainer.precision=bf16", "false": ""},
        refused="`trainer.precision=bf16` or not",
    ),
    "load_in_4bit": Alias(
        values={"true": "model.quantization=int4", "false": ""}, refused="quantization=int4"
    ),
    "load_in_8bit": Alias(
        values={"true": "model.quantization=int8", "false": ""}, refused="quantization=int8"
    ),
    "use_cpu": Alias(values={"true": "model.device=cpu", "false": ""}, refused="model.device=cpu"),
    "no_cuda": Alias(values={"true": "model.device=cpu", "false": ""}, refused="model.device=cpu"),
    # What is in the folder is set aside, and the work begins anew; export and quantize have their own.
    "overwrite_output_dir": Alias(
        to=("overwrite",), values={"true": "resume=never", "false": ""}, refused="resume=never"
    ),
    "resume_from_checkpoint": Alias(to=("resume",), values={"true": "resume=auto", "false": "resume=never"}),
    "eval_strategy": Alias(
        values={"steps": "", "no": "data.validation_file=null"},
        refused="evaluations are counted in steps: write `trainer.eval_steps=N`",
    ),
    "save_strategy": Alias(
        values={"steps": ""}, refused="checkpoints are counted in steps: write `trainer.save_steps=N`"
    ),
    "logging_strategy": Alias(
        values={"steps": ""}, refused="lines of the log are counted in steps: write `trainer.logging_steps=N`"
    ),
    "fsdp": Alias(
        values={"true": "distributed=fsdp", "full_shard": "distributed=fsdp", "false": "", "": ""}
        | {"full_shard auto_wrap": "distributed=fsdp"},
        refused="write `distributed=fsdp`",
    ),
    "train_sampling_strategy": Alias(
        values={"random": "trainer.group_by_length=false", "group_by_length": "trainer.group_by_length=true"}
        | {"sequential": "trainer.shuffle=false trainer.group_by_length=false"},
        refused="write `trainer.shuffle=...` and `trainer.group_by_length=...`",
    ),
    "sortish_sampler": Alias(
        values={"true": "trainer.group_by_length=true", "false": ""}, refused="trainer.group_by_length"
    ),
    "do_train": Alias(
        needless="`glmtune train` does that", refused="write `glmtune train`", own=("train", "plan")
    ),
    "do_eval": Alias(
        needless="rows of `data.validation_file` are evaluated while training",
        refused="write `glmtune predict split=validation`",
        own=("train", "plan"),
    ),
    "do_predict": Alias(
        needless="`glmtune predict` does that",
        refused="write `glmtune predict prefix_path=RUN` when the run is over",
        own=("predict",),
    ),
}
# What only generates, where training generates nothing.
_ANSWERS = {
    # An evaluation has a length of answers of its own, and nothing else of these.
    name: Alias(
        (setting, "benchmark.max_new_tokens", "max_new_tokens")
        if setting.endswith("max_new_tokens")
        else (setting,),
        refused=f"`{setting}=...` is a setting of `glmtune predict`",
    )
    for setting, names in {
        "generation.max_new_tokens": "max_new_tokens val_max_target_length generation_max_length max_tokens",
        "generation.num_beams": "num_beams generation_num_beams",
        "generation.temperature": "temperature",
        "generation.top_p": "top_p",
        "generation.top_k": "top_k",
        "generation.do_sample": "do_sample",
        "generation.repetition_penalty": "repetition_penalty",
    }.items()
    for name in names.split()
}
_SWITCHES["evaluation_strategy"] = _SWITCHES["eval_strategy"]
# Passes over the rows decide only where no number of steps does, which every recipe sets.
EPOCHS = "trainer.num_train_epochs"
_EPOCHS = _renamed({"epochs epoch num_epochs n_epochs num_train_epochs max_epochs": EPOCHS})
_NEEDLESS = _needless(
    {
        "predict_with_generate": "`glmtune predict` always generates, and training never does",
        "overwrite_cache": "what is kept of a file is told by its content, so a changed one is read anew",
        "preprocessing_num_workers": "large files are encoded by several processes (data.num_workers)",
        "ignore_pad_token_for_loss": "padding is never learnt",
        "remove_unused_columns": "only the columns of the layout are read",
        "dataloader_pin_memory": "that follows from the device",
        "ddp_find_unused_parameters": "all that is trained is used",
        "load_best_model_at_end": "`best` and `last` are both written into the run folder",
        "greater_is_better": "the metric says it",
        "local_rank": "the launcher's environment says it",
        "trust_remote_code": "all code is glmtune's own, and none of a checkpoint runs",
        "use_fast_tokenizer": "the tokenizer is the release's own",
        "use_auth_token": "HF_TOKEN of the environment is used",
        "output_scores": "no answer needs them",
    }
)
_REFUSED = _refused(
    {
        "train_batch_size total_batch_size global_batch_size": (
            "rows of a step are `trainer.per_device_train_batch_size=A` times "
            "`trainer.gradient_accumulation_steps=B` times processes: write these"
        ),
        "max_length max_seq_length cutoff_len model_max_length block_size": (
            "question and answer have lengths of their own: write `data.max_source_length=N"
            " data.max_target_length=N`"
        ),
        "pad_to_max_length": "a batch is padded to its longest row: `data.pad_to_multiple_of=N` rounds up",
        "tokenizer_name tokenizer_path tokenizer_name_or_path": "the tokenizer is that of `model`",
        "config_name model_config": "the architecture is that of `model`",
        "config_file config config_path": "settings are read from a file by `glmtune COMMAND FILE.yaml`",
        "multirun": "a command is one run: repeat it in a loop of the shell",
        "cache_dir": "downloads go where HF_HOME of the environment says: `export HF_HOME=FOLDER`",
        "model_revision": "download that revision (`hf download`) and write `model=FOLDER`",
        "logging_dir": "the log is written into the run folder: write `output_dir=FOLDER`",
        "data_seed": "`seed=N` is that of everything random",
        "hub_token": "HF_TOKEN of the environment is used",
    }
)
_UNSUPPORTED = {
    # Arguments of transformers' trainer without a counterpart, and their defaults: those are obeyed.
    "none": "lr_scheduler_kwargs optim_args optim_target_modules tf32 activation_checkpointing_kwargs "
    "gradient_checkpointing_kwargs torch_compile_backend torch_compile_mode liger_kernel_config "
    "neftune_noise_alpha torch_empty_cache_steps eval_accumulation_steps hub_model_id hub_revision "
    "hub_private_repo accelerator_config parallelism_config dataloader_prefetch_factor "
    "dataloader_multiprocessing_context label_names ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
    "ddp_backend fsdp_config generation_config trackio_bucket_id trackio_static_space_id trackio_space_id "
    "source_lang target_lang forced_bos_token",
    "false": "bf16_full_eval fp16_full_eval use_liger_kernel use_cache auto_find_batch_size "
    "logging_first_step eval_on_start eval_use_gather_object batch_eval_metrics save_only_model "
    "save_on_each_node enable_jit_checkpoint push_to_hub hub_always_push ignore_data_skip "
    "restore_callback_states_from_checkpoint full_determinism dataloader_drop_last disable_tqdm "
    "dataloader_persistent_workers prediction_loss_only include_num_input_tokens_seen",
    "true": "average_tokens_across_devices log_on_each_node logging_nan_inf_filter "
    "eval_do_concat_batches dataloader_in_order skip_memory_metrics",
    "0": "label_smoothing_factor eval_delay",
    "[]": "include_for_metrics debug",
    "passive": "log_level",
    "warning": "log_level_replica",
    "every_save": "hub_strategy",
    "length": "length_column_name",
    "huggingface": "project",
}
UNSUPPORTED: Mapping[str, str] = {
    name: default for default, names in _UNSUPPORTED.items() for name in names.split()
}
ALIASES: Mapping[str, Alias] = {**_RENAMED, **_SWITCHES, **_ANSWERS, **_EPOCHS, **_NEEDLESS, **_REFUSED}
VALUES: Mapping[str, Mapping[str, str]] = {
    "trainer.report_to": {"none": "[]"},
    "report_to": {"none": "[]"},
    "trainer.max_steps": {"-1": "null"},
    "trainer.save_total_limit": {"-1": "null"},
    "trainer.optim": {"adamw": "adamw_torch", "adam": "adamw_torch", "adamw_hf": "adamw_torch"}
    | {"adamw_8bit": "adamw_bnb_8bit", "paged_adamw": "paged_adamw_32bit"},
    "trainer.metric_for_best_model": {"eval_loss": "loss", "eval_accuracy": "accuracy"},
    "trainer.precision": {"no": "fp32", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"},
}
"""By setting: values that other tools have for one of ours."""


def settings_meant(name: str, known: Iterable[str]) -> list[str]:
    """Return what a name of other tools is called here, for messages.

    Args:
        name: such as ``bf16``, without a section.
        known: settings and groups of the command.

    Returns:
        Settings, or words with a value, most likely first; none where the table does not know the name.
    """
    alias = ALIASES.get(name)
    if alias is None:
        return []
    there = set(known)
    found = [path for path in alias.to if path in there]
    words = alias.values.get("true", "").split()
    return found or [word for word in words if word.partition("=")[0] in there]
