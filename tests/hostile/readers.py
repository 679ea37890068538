"""Everything that reads a file of strangers: a valid file of each kind, and the function that a command reads it with.

Valid files are made by those who write them, so that they stay valid when a format changes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

Make = Callable[[Path], object]


@dataclass(frozen=True)
class Reader:
    """A kind of file.

    Attributes:
        folder: of `FOLDERS`: where it lies, with all that belongs to it.
        file: its place in there.
        read: reads it, given the folder; raises `GlmtuneError` for what it does not take.
    """

    folder: str
    file: str
    read: Make


def make_rows(folder: Path) -> None:
    """Write data files of every form."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": "问\u0085", "response": "答\u2028"}, {"prompt": "b", "response": "c"}]
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    texts = {
        "rows.json": json.dumps(rows, ensure_ascii=False),
        "rows.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "chat.json": json.dumps(chat),
        "rows.csv": 'prompt,response\n"a, b",c\nd,"e\nf"\n',
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")


def make_evaluation(folder: Path) -> None:
    """Evaluate the embedded model on two questions."""
    from recipes.eval import COMMAND, run
    from recipes.words.compose import load_settings

    words = ["benchmark=ceval", "benchmark.subjects=[high_school_biology]", "benchmark.limit=2"]
    run(load_settings(COMMAND, [*words, "num_threads=1", f"output_dir={folder}"]))


def make_predictions(folder: Path) -> None:
    """Keep three answers as `predict` does."""
    from glmtune.inference.predict.predictions import Prediction
    from glmtune.storage.journal import Journal

    with Journal(folder / "generated_predictions.jsonl") as journal:
        for row in range(3):
            journal.append(Prediction(row, "答\u2028案", "答案", "问", "eos", 4, None, {"bleu-4": 0.5}))


def make_run(folder: Path) -> None:
    """Write what a training leaves: a checkpoint, its log, its settings, a rollback."""
    from glmtune.training.checkpoints.folder import writing
    from glmtune.training.log import append_entry
    from glmtune.training.watching.rollback_log import ROLLBACKS_FILE, Rollback, append_item
    from recipes.train import COMMAND
    from recipes.words.compose import compose

    with writing(folder / "checkpoint-2", manifest={"step": 2, "num_processes": 1}) as checkpoint:
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "prefix_encoder.safetensors"):
            (checkpoint / name).write_bytes(b"tensors")
        for name in ("trainer_state.json", "loss_state.json"):
            (checkpoint / name).write_text("{}")
    for step in (1, 2):
        append_entry(folder, {"step": step, "loss": 7.5 - step, "learning_rate": 1e-3})
    append_item(folder / ROLLBACKS_FILE, dataclasses.asdict(Rollback(4, 2, 0.5)))
    values = compose(COMMAND, ["+recipe=ptuning"])
    (folder / "config.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")


def _native() -> Any:
    from glmtune.models.checkpoints.config import native_config
    from glmtune.models.load import build_model
    from glmtune.models.releases.families import Family

    torch.manual_seed(0)
    return build_model(native_config(OFFICIAL, Family.CHATGLM2))


def make_prefix(folder: Path) -> None:
    """Save a prefix."""
    from glmtune.prefix.checkpoint import save_prefix
    from glmtune.prefix.encoder import PrefixEncoder, prefix_shape

    model = _native()
    save_prefix(PrefixEncoder(prefix_shape(model.config), pre_seq_len=3), folder)


def make_adapter(folder: Path) -> None:
    """Save an adapter as peft does."""
    from peft import LoraConfig, get_peft_model

    wanted = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(_native(), wanted).save_pretrained(folder, save_embedding_layers=False)


def make_model(folder: Path) -> None:
    """Save a model of the official format in shards, with its index."""
    from glmtune.models.later import OfficialGlmForCausalLM

    model = OfficialGlmForCausalLM(_native().config)
    model.save_pretrained(folder, max_shard_size=20_000)


def make_cluster(folder: Path) -> None:
    """Write what runs of several processes are told."""
    (folder / "hosts").write_text("node0 slots=2\nnode1 slots=4  # the old one\n")
    values = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "steps_per_print": 10,
    }
    (folder / "deepspeed.json").write_text(json.dumps(values))


def read_data(path: Path) -> object:
    """Read a data file as `glmtune data check` does: rows, their layout, messages."""
    from glmtune.data.reading.layouts import convert, detect_layout
    from glmtune.data.reading.readers import read_rows
    from glmtune.data.records import RowProblem
    from glmtune.data.settings import DataSettings

    rows = list(read_rows(path).rows)
    layout = detect_layout(rows, DataSettings(), str(path)) if rows else None
    for row in rows:
        try:
            assert layout is not None
            convert(layout, row.values)
        except RowProblem:  # such a row is listed, with its line
            continue
    return rows


def read_journals(folder: Path) -> object:
    """As `eval` does before it goes on."""
    from evaluation.running import run_folder

    return run_folder.read_journals(folder)


def read_evaluation(folder: Path) -> object:
    """As `compare` does."""
    from evaluation.compare.pairing.runs import find_runs

    return find_runs(folder)


def read_predictions(folder: Path) -> object:
    """As `score` does."""
    from glmtune.inference.predict.predictions import read_predictions

    return read_predictions(folder / "generated_predictions.jsonl")


def read_run(folder: Path) -> object:
    """As `train` does before it goes on."""
    from glmtune.training.checkpoints.folder import checkpoint_at, latest_checkpoint
    from glmtune.training.log import read_log
    from glmtune.training.watching.rollback_log import read_rollbacks

    latest_checkpoint(folder)
    return checkpoint_at(folder / "checkpoint-2"), read_log(folder), read_rollbacks(folder)


def read_settings(folder: Path) -> object:
    """As `glmtune train --settings FILE` does, without the run."""
    from glmtune.cli import _stored_settings
    from recipes.train import COMMAND

    return _stored_settings(["--settings", str(folder / "config.yaml")], COMMAND)


def read_prefix(folder: Path) -> object:
    """As `glmtune info` and `predict` do."""
    from glmtune.prefix.checkpoint import describe_prefix, load_prefix

    return describe_prefix(folder), load_prefix(folder, _native())


def read_adapter(folder: Path) -> object:
    """As `predict` does."""
    from glmtune.adapter import load_adapter

    return load_adapter(folder, _native(), check_base=False)


def read_model(folder: Path) -> object:
    """As `glmtune info` does, and the headers of all weights."""
    from glmtune.models.checkpoints.config import native_config
    from glmtune.models.checkpoints.config_rules import read_config
    from glmtune.models.checkpoints.shards import read_records
    from glmtune.models.releases.families import Family

    return native_config(read_config(folder), Family.CHATGLM2), read_records(folder)


def read_hosts(folder: Path) -> object:
    """As `train launch.hostfile=FILE` does."""
    from glmtune.training.distributed.hosts import read_hostfile

    return read_hostfile(folder / "hosts")


def read_deepspeed(folder: Path) -> object:
    """As `train deepspeed.config_file=FILE` does."""
    from glmtune.training.distributed.deepspeed_settings import DeepSpeedSettings, deepspeed_config, effective
    from glmtune.training.settings import TrainerSettings

    settings = DeepSpeedSettings(config_file=str(folder / "deepspeed.json"))
    effective(settings, hidden_size=32)
    return deepspeed_config(settings, TrainerSettings(), precision="no", has_gpu=False)


OFFICIAL: Mapping[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
    "num_attention_heads": 4,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "padded_vocab_size": 128,
    "seq_length": 256,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
FOLDERS: Mapping[str, Make] = {
    "rows": make_rows,
    "evaluation": make_evaluation,
    "predictions": make_predictions,
    "run": make_run,
    "prefix": make_prefix,
    "adapter": make_adapter,
    "model": make_model,
    "cluster": make_cluster,
}
READERS: Mapping[str, Reader] = {
    **{
        f"{name.replace('.', '-')}": Reader("rows", name, lambda folder, name=name: read_data(folder / name))
        for name in ("rows.json", "rows.jsonl", "chat.json", "rows.csv", "rows.parquet")
    },
    "journal": Reader("evaluation", "journal-rank0.jsonl", read_journals),
    "eval-results": Reader("evaluation", "results.json", read_evaluation),
    "eval-answers": Reader("evaluation", "answers.jsonl", read_evaluation),
    "predictions": Reader("predictions", "generated_predictions.jsonl", read_predictions),
    "manifest": Reader("run", "checkpoint-2/checkpoint.json", read_run),
    "training-log": Reader("run", "trainer_log.jsonl", read_run),
    "rollbacks": Reader("run", "rollbacks.json", read_run),
    "settings": Reader("run", "config.yaml", read_settings),
    "prefix": Reader("prefix", "prefix_encoder.safetensors", read_prefix),
    "adapter-config": Reader("adapter", "adapter_config.json", read_adapter),
    "adapter-weights": Reader("adapter", "adapter_model.safetensors", read_adapter),
    "model-config": Reader("model", "config.json", read_model),
    "weights-index": Reader("model", "model.safetensors.index.json", read_model),
    "weights": Reader("model", "model-00001-of-*.safetensors", read_model),
    "hostfile": Reader("cluster", "hosts", read_hosts),
    "deepspeed": Reader("cluster", "deepspeed.json", read_deepspeed),
}
