"""What a run leaves for its readers: environment, results, the loss curve, and a model card."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from glmtune.training.settings import METRICS
from glmtune.version import __version__

# Shown in the model card and at the end of a run, in this order.
SCORES = (
    *("train_loss", "baseline_eval_loss", "final_eval_loss", "best_eval_loss"),
    *("baseline_eval_accuracy", "final_eval_accuracy", "best_eval_accuracy", "best_step"),
)
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "sentencepiece", "numpy")


def environment(*, seed: int) -> dict[str, Any]:
    """Describe the machine and the software of a run.

    Args:
        seed: of the run.
    """
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "glmtune": __version__,
        "commit": _commit(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
        "seed": seed,
        "command": " ".join(sys.argv),
    }


def summarize_run(entries: Sequence[Mapping[str, Any]], *, metric: str = "loss") -> dict[str, Any]:
    """Reduce a training log to the numbers that matter.

    Args:
        entries: lines of ``trainer_log.jsonl``, oldest first.
        metric: what chooses the best evaluation.

    Returns:
        ``train_loss`` (mean over all steps logged), ``final_train_loss``, ``train_tokens_per_second`` (real
        tokens, mean over log intervals), ``peak_memory_bytes``, and, where there were evaluations,
        ``baseline_eval_loss`` (before the first step), ``final_eval_loss``, likewise ``..._accuracy``, and
        ``best_eval_<metric>`` with its step.
    """
    steps = [entry for entry in entries if "loss" in entry]
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    numbers: dict[str, Any] = {}
    if steps:
        # A logged loss is the mean of the steps since the line before, so it weighs as many steps.
        widths = [
            b["step"] - a for a, b in zip([0, *(entry["step"] for entry in steps)], steps, strict=False)
        ]
        total = sum(entry["loss"] * width for entry, width in zip(steps, widths, strict=True))
        numbers["train_loss"] = total / max(sum(widths), 1)
        numbers["final_train_loss"] = steps[-1]["loss"]
        numbers["train_tokens"] = steps[-1]["tokens"]
        speeds = [entry["tokens_per_second"] for entry in steps]
        numbers["train_tokens_per_second"] = round(sum(speeds) / len(speeds), 1)
        numbers["peak_memory_bytes"] = max(entry["memory_bytes"] for entry in steps)
    if evaluations and evaluations[0]["step"] == 0:
        numbers["baseline_eval_loss"] = evaluations[0]["eval_loss"]
        numbers["baseline_eval_accuracy"] = evaluations[0]["eval_accuracy"]
    if evaluations and evaluations[-1]["step"] > 0:
        tuned = [entry for entry in evaluations if entry["step"] > 0]
        key = f"eval_{metric}"
        best = (max if METRICS[metric] else min)(tuned, key=lambda entry: entry[key])
        numbers["final_eval_loss"] = tuned[-1]["eval_loss"]
        numbers["final_eval_accuracy"] = tuned[-1]["eval_accuracy"]
        numbers[f"best_{key}"], numbers["best_step"] = best[key], best["step"]
    return numbers


def plot_loss(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the training and evaluation losses over the steps.

    Args:
        entries: lines of ``trainer_log.jsonl``.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o--")):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per answer token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path)


def model_card(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Write the card of a tuned model.

    Args:
        settings: all settings of the run, nested.
        results: content of ``all_results.json``.

    Returns:
        Markdown.
    """
    tune, base = settings["tune"], settings["model"]["source"]
    bits = settings["model"].get("quantization_bit")
    method = f"int{bits}" if bits else settings["model"].get("quantization")
    title = {"prefix": "P-Tuning v2 prefix", "lora": "LoRA adapter", "full": "fully tuned model"}[tune]
    scores = [(name, results[name]) for name in SCORES if name in results]
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {value:.4f} |"
        if isinstance(value, float)
        else f"| {name.replace('_', ' ')} | {value} |"
        for name, value in scores
    )
    trainer = settings["trainer"]
    batch = trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"]
    return f"""---
base_model: {base}
library_name: glmtune
tags: [glm, {"p-tuning-v2" if tune == "prefix" else tune}]
---

# {title} for {base}

Trained with glmtune {results["glmtune"]}: {results["steps"]} steps of {batch} rows, learning rate
{trainer["learning_rate"]}, seed {settings["seed"]}. `config.yaml` holds every setting, `environment.json` the
machine and the versions, `trainer_log.jsonl` the course of the training.

| | |
|---|---|
| base model | {base}{"" if method is None else f", quantized to {method}"} |
| base fingerprint | `{results["base_fingerprint"][:16]}` |
| training data | {results["train_path"]} ({results["train_rows"]} rows) |
| data fingerprint | `{results["data_fingerprint"][:16]}` |
| parameters trained | {results["trained_parameters"]:,} of {results["all_parameters"]:,} |
{rows}

Losses are nats per answer token, accuracies the share of answer tokens that the model finds most probable,
both on the validation rows; the baseline is the base model without tuning.

## Use

```python
{_usage(tune, base, method)}
```
"""


def _usage(tune: str, base: str, method: str | None) -> str:
    options = "" if method is None else f', quantization="{method}"'
    if tune == "full":
        return (
            "from glmtune import load_model, load_tokenizer\n\n"
            'model = load_model("last")\ntokenizer = load_tokenizer("last")'
        )
    if tune == "prefix":
        return (
            "from glmtune import load_model, load_tokenizer\n\n"
            f'model = load_model("{base}", prefix="last"{options})\ntokenizer = load_tokenizer("{base}")'
        )
    return (
        "from glmtune import load_model, load_tokenizer\nfrom peft import PeftModel\n\n"
        f'model = PeftModel.from_pretrained(load_model("{base}"{options}), "last")\n'
        f'tokenizer = load_tokenizer("{base}")'
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout that glmtune runs from, None for an installed wheel."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
