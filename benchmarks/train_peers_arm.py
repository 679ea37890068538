"""One training run of one tool, in the environment of that tool, watched from inside: see train_peers.py.

All arms end in `transformers.Trainer`, whose steps are counted by what is put around them here: the tokens
handed to the model, those of them that are real, the losses, the seconds. Nothing of glmtune is imported but
by its own arms, so that this file runs in an environment that has the other tool alone.

    PYTHON benchmarks/train_peers_arm.py JOB.json
"""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

IGNORE_INDEX = -100
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def seconds_of_life() -> float:
    """Return how long this process has lived: the interpreter's start and all imports count."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    up = float(Path("/proc/uptime").read_text().split()[0])
    return up - int(fields[19]) / CLOCK_TICKS


def observe(job: dict[str, Any]) -> None:
    """Put counters around `transformers.Trainer`; the process ends when training does."""
    import torch
    from transformers import Trainer, TrainerCallback

    torch.set_num_threads(job["threads"])
    found: dict[str, Any] = {"real": 0, "computed": 0, "labels": 0, "steps": [], "losses": []}
    began: list[float] = []
    step = {"labels": 0}

    class Observer(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not began:
                began.extend((time.process_time(), time.perf_counter()))
                found["until_begin"] = [time.process_time(), seconds_of_life()]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not found["steps"]:
                found["first_step"] = [time.process_time(), seconds_of_life()]
            found["steps"].append([time.process_time() - began[0], time.perf_counter() - began[1]])

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                found["losses"].append([float(logs["loss"]), step["labels"]])
                step["labels"] = 0

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            Path(job["result"]).write_text(json.dumps(found))
            sys.stdout.flush()
            os._exit(0)  # what a tool saves or reports after training is not compared

    start, training_step = Trainer.__init__, Trainer.training_step

    # With the signatures of what they replace, which tools look at.
    @functools.wraps(start)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.add_callback(Observer())

    @functools.wraps(training_step)
    def counted(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        real = mask if mask is not None else ids != job["pad_token_id"]
        labels = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        found["real"] += int(real.sum())
        found["computed"] += ids.numel()
        found["labels"] += labels
        step["labels"] += labels
        return training_step(self, model, inputs, *args, **kwargs)

    Trainer.__init__, Trainer.training_step = init, counted


def run_glmtune(job: dict[str, Any]) -> None:
    """Train by `glmtune train`, as users type it."""
    from glmtune.cli import main

    words = {
        "model.source": job["model"],
        "model.dtype": "float32",
        "data.train_file": job["rows"],
        "data.layout": "openai",
        "data.max_source_length": job["lengths"]["source"],
        "data.max_target_length": job["lengths"]["target"],
        "retention": "null",  # the others measure nothing beside the task
        "output_dir": job["out"],
        "seed": 1,
        "trainer.max_steps": "null",
        "trainer.num_train_epochs": 1,
        "trainer.per_device_train_batch_size": job["micro_batch"],
        "trainer.gradient_accumulation_steps": job["accumulation"],
        "trainer.learning_rate": job["learning_rate"],
        "trainer.lr_scheduler_type": "constant",
        "trainer.logging_steps": 1,
        "trainer.save_steps": 100000,
        "trainer.report_to": "[]",
        "trainer.num_threads": job["threads"],
    }
    if job["method"] == "lora":
        recipe = "lora"
        words |= {"lora.rank": job["rank"], "lora.alpha": 2 * job["rank"], "lora.dropout": 0}
        words |= {"lora.targets": f"[{','.join(job['targets'])}]"}
    else:
        recipe = "ptuning_official"
        words |= {"prefix.pre_seq_len": job["pre_seq_len"], "prefix.prefix_projection": "false"}
    if job["arm"].endswith("-packed"):
        # As many rows in an optimizer step as the others have, a packed row at a time.
        rows = job["micro_batch"] * job["accumulation"]
        count = max(1, round(rows * job["lengths"]["mean"] / job["packing_length"]))
        words |= {"data.packing": "true", "data.packing_length": job["packing_length"]}
        words |= {"trainer.per_device_train_batch_size": 1, "trainer.gradient_accumulation_steps": count}
    sys.exit(main(["train", f"+recipe={recipe}", "data=files", *(f"{k}={v}" for k, v in words.items())]))


def encoded_rows(job: dict[str, Any], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Encode the rows as a plain script does: the folder's chat template, loss on the answer and its end."""
    rows: list[dict[str, list[int]]] = []
    for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines():
        *asked, answer = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        target = tokenizer(answer["content"], add_special_tokens=False)["input_ids"]
        target = [*target, tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + target, "labels": [IGNORE_INDEX] * len(prompt) + target})
    return rows


def run_trainer(job: dict[str, Any]) -> None:
    """Train by plain `Trainer` and PEFT: LoRA, PEFT's prefix tuning, or a prefix in the official layout."""
    import torch
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.padding_side = "right"
    rows = encoded_rows(job, tokenizer)
    padding: dict[str, Any] = {}
    if job["arm"] == "official":
        # The released script pads every row to max_source_length + max_target_length + 1.
        padding = {"padding": "max_length", "max_length": max(len(row["input_ids"]) for row in rows)}
        model = prefix_on_base(job)
    else:
        base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        config: Any = (
            LoraConfig(
                r=job["rank"], lora_alpha=2 * job["rank"], lora_dropout=0, target_modules=job["targets"],
                task_type="CAUSAL_LM",
            )
            if job["method"] == "lora"
            else PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=job["pre_seq_len"])
        )  # fmt: skip
        model = get_peft_model(base, config)
    grouped: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if job["grouped"] else {}
    arguments = TrainingArguments(
        output_dir=job["out"], num_train_epochs=1, per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["accumulation"], learning_rate=job["learning_rate"],
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, seed=1, **grouped,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, **padding)
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator).train()


def prefix_on_base(job: dict[str, Any]) -> Any:
    """Put our prefix on the base: the official layout with our model, so that the layout alone differs."""
    from glmtune.loading import load_model, load_tokenizer
    from glmtune.prefix.attach import attach_prefix, freeze_base
    from glmtune.prefix.init import build_prefix_encoder
    from glmtune.prefix.settings import PrefixSettings

    model = load_model(job["model"], dtype="float32", device="cpu")
    settings = PrefixSettings(pre_seq_len=job["pre_seq_len"], prefix_projection=False)
    attach_prefix(model, build_prefix_encoder(model, settings, load_tokenizer(job["model"])))
    freeze_base(model)
    model.config.use_cache = False
    return model


def run_llamafactory(job: dict[str, Any]) -> None:
    """Train by LLaMA-Factory, which no longer has ChatGLM2's template: it is registered as it once was."""
    if find_spec("torchaudio") is None:  # imported for what hears; rows of text need none of it
        empty = ModuleType("torchaudio")
        empty.__spec__ = ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = empty

    from llamafactory.data.formatter import EmptyFormatter, StringFormatter
    from llamafactory.data.template import register_template
    from llamafactory.train.tuner import run_exp

    register_template(
        name="chatglm2",
        format_user=StringFormatter(slots=["[Round 1]\n\n问：{{content}}\n\n答："]),
        format_prefix=EmptyFormatter(slots=[{"token": "[gMASK]"}, {"token": "<sop>"}]),
    )
    folder = Path(job["out"])
    folder.mkdir(parents=True, exist_ok=True)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    about = {
        "file_name": job["rows"],
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": tags,
    }
    (folder / "dataset_info.json").write_text(json.dumps({"rows": about}))
    values = {
        "model_name_or_path": job["model"], "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_target": ",".join(job["targets"]), "lora_rank": job["rank"], "lora_alpha": 2 * job["rank"],
        "lora_dropout": 0.0, "dataset_dir": str(folder), "dataset": "rows", "template": "chatglm2",
        "cutoff_len": job["max_length"], "overwrite_cache": True, "preprocessing_num_workers": 1,
        "output_dir": str(folder / "out"), "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "num_train_epochs": 1, "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["accumulation"], "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False, "fp16": False,
        "disable_tqdm": True, "seed": 1, "infer_dtype": "float32", "trust_remote_code": False,
        "disable_gradient_checkpointing": True,
    }  # fmt: skip
    if job["grouped"]:
        values["train_sampling_strategy"] = "group_by_length"
    run_exp(values)


def run_swift(job: dict[str, Any]) -> None:
    """Train by ms-swift."""
    from swift.pipelines import sft_main

    values: dict[str, Any] = {
        "model": job["model"], "model_type": "glm4", "template": "chatglm2", "tuner_type": "lora",
        "dataset": job["rows"], "torch_dtype": "float32", "lora_rank": job["rank"],
        "lora_alpha": 2 * job["rank"], "lora_dropout": 0, "max_length": job["max_length"],
        "output_dir": job["out"], "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "num_train_epochs": 1, "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["accumulation"], "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant", "warmup_ratio": 0, "use_cpu": "true", "bf16": "false",
        "fp16": "false", "gradient_checkpointing": "false", "seed": 1, "split_dataset_ratio": 0,
        "dataset_num_proc": 1, "dataloader_num_workers": 0, "attn_impl": "sdpa", "disable_tqdm": "true",
    }  # fmt: skip
    if job["grouped"]:
        values["group_by_length"] = "true"
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    sft_main([*words, "--target_modules", *job["targets"]])


ARMS = {
    "glmtune": run_glmtune,
    "glmtune-packed": run_glmtune,
    "trainer": run_trainer,
    "official": run_trainer,
    "llamafactory": run_llamafactory,
    "swift": run_swift,
}


def main() -> None:
    """Run the job of a file."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    observe(job)
    ARMS[job["arm"].removesuffix("-grouped")](job)
    raise SystemExit(f"{job['arm']} ended before its training did")


if __name__ == "__main__":
    main()
