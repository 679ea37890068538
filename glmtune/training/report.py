"""What a run leaves for its readers: environment, results, the loss curve, and a model card."""

from __future__ import annotations

import json
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

from glmtune.command_line import typed_command
from glmtune.data import as_trained
from glmtune.data.truncation import unseen_of
from glmtune.memory import device_name
from glmtune.models.devices import list_devices
from glmtune.settings import as_given
from glmtune.storage.checksums import checked_json, json_with_checksum
from glmtune.storage.files import write_json
from glmtune.training.log import BRANCHED, sets_of
from glmtune.training.measuring.report import retention_section
from glmtune.training.preference.report import preference_section
from glmtune.training.settings import METRICS
from glmtune.training.starting.switch_fitting import SwitchOutcome
from glmtune.version import __version__

# Shown in the model card and at the end of a run, in this order.
SCORES = (
    *("train_loss", "baseline_eval_loss", "final_eval_loss", "switched_eval_loss", "best_eval_loss"),
    *("baseline_eval_accuracy", "final_eval_accuracy", "best_eval_accuracy", "best_step"),
    *("final_eval_retention", "final_eval_retention_kl", "final_eval_leak_rate"),
    "final_eval_retention_switched_off",
    *("best_eval_retention", "best_eval_retention_kl", "best_eval_leak_rate"),
)
PACKAGES = (
    *("torch", "transformers", "accelerate", "deepspeed", "peft", "datasets", "tokenizers", "sentencepiece"),
    "numpy",
)


RESULTS_FILE = "all_results.json"
# As in the log, the checksum leaves out what differs from run to run.
CLOCK = frozenset({"train_tokens_per_second", "peak_memory_bytes", "retention_seconds", "run_seconds"})


def write_results(run: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Write the results of a run, with their checksum; return what the file says.

    Raises:
        OSError: the disk is full.
    """
    said = json_with_checksum(results, apart=CLOCK)
    write_json(run / RESULTS_FILE, said)
    return said


def read_results(run: Path) -> dict[str, Any] | None:
    """Return what the results of a run say, checksum included; None where there are none.

    Raises:
        OSError: they are there, but cannot be read.
        ValueError: they are damaged.
    """
    try:
        text = (run / RESULTS_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    results = checked_json(text, apart=CLOCK)
    if results.get("finished") and not isinstance(results.get("steps"), int):
        raise ValueError("it tells of no `steps`")
    return json.loads(text)


def environment(*, seed: int) -> dict[str, Any]:
    """Describe the machine and the software of a run.

    Args:
        seed: of the run.
    """
    gpus = [device_name(device) for device in list_devices()]
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
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
        "seed": seed,
        "command": typed_command(),
    }


def summarize_run(
    entries: Sequence[Mapping[str, Any]], *, metric: str = "loss", target: float | None = None
) -> dict[str, Any]:
    """Reduce a training log to the numbers that matter.

    Args:
        entries: lines of ``trainer_log.jsonl``, oldest first.
        metric: what chooses the best evaluation.
        target: among those that keep at least this share of the base's answers; None: among all.

    Returns:
        ``train_loss`` (mean over all steps logged), ``final_train_loss``, ``train_tokens_per_second`` (real
        tokens, mean over log intervals), ``peak_memory_bytes``, and, where there were evaluations,
        ``baseline_eval_loss`` (before the first step), ``final_eval_loss``, likewise ``..._accuracy``, and
        ``best_eval_<metric>`` with its step, if one may be the best.
    """
    steps = [entry for entry in entries if "loss" in entry]
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    numbers: dict[str, Any] = {}
    if steps:
        # A logged loss is the mean of the steps since the line before, so it weighs as many steps.
        first = next((entry["step"] for entry in entries if entry.get("alert") == BRANCHED), 0)
        widths = [
            b["step"] - a for a, b in zip([first, *(entry["step"] for entry in steps)], steps, strict=False)
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
        numbers["final_eval_loss"] = tuned[-1]["eval_loss"]
        numbers["final_eval_accuracy"] = tuned[-1]["eval_accuracy"]
        for name in sets_of(tuned[-1]):
            numbers[f"final_eval_{name}_loss"] = tuned[-1][f"eval_{name}_loss"]
        if "eval_switched_loss" in tuned[-1]:
            numbers["switched_eval_loss"] = tuned[-1]["eval_switched_loss"]
        allowed = [entry for entry in tuned if target is None or entry.get("eval_retention", 0.0) >= target]
        if allowed:
            best = (max if METRICS[metric] else min)(allowed, key=lambda entry: entry[key])
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
    compares = any("rewards/margins" in entry for entry in entries)
    axes.set_ylabel("preference loss" if compares else "loss (nats per answer token)")
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
    tune, base = settings["tune"], as_given("model.source", settings["model"]["source"])
    bits = settings["model"].get("quantization_bit")
    method = f"int{bits}" if bits else settings["model"].get("quantization")
    embeddings = settings["model"].get("quantization_embeddings")
    quantized = "" if method is None else f", quantized to {method}"
    quantized += "" if embeddings is None else f", embedding and head in {embeddings.upper()}"
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
machine and the versions, `trainer_log.jsonl` the course of the training.{_changes(results)}

| | |
|---|---|
| base model | {base}{quantized} |
| base fingerprint | `{results["base_fingerprint"][:16]}` |
| training data | {results["train_path"]} ({results["train_rows"]} rows) |{_beginning(results)}
| data fingerprint | `{results["data_fingerprint"][:16]}` |{_rows_seen(results)}
{_switch(results)}| parameters trained | {results["trained_parameters"]:,} of {results["all_parameters"]:,} |
{rows}

{_meaning(settings)}
{preference_section(results)}{retention_section(results)}
## Use

```python
{_usage(tune, base, method, embeddings)}
```
"""


def _meaning(settings: Mapping[str, Any]) -> str:
    """Say what the figures of the table are."""
    if preference := settings.get("preference"):
        loss = preference["loss"]
        right = "pairs whose better\nanswer has the higher reward"
        if loss == "kto":
            right += " (of single answers those whose reward has the sign of the judgement)"
        baseline = "the model without tuning" if loss == "orpo" else "the reference"
        return (
            f"Losses are those of {loss} (beta {preference['beta']}), accuracies the share of {right}, both"
            f" on the validation rows; the baseline is {baseline}."
        )
    return (
        "Losses are nats per answer token, accuracies the share of answer tokens that the model finds most"
        " probable,\nboth on the validation rows; the baseline is the base model without tuning."
    )


def _beginning(results: Mapping[str, Any]) -> str:
    """Say which earlier tuning a run began with, as a row of the table."""
    found = results.get("started_from")
    return f"\n| began with | {found['path']} (`{found['fingerprint'][:16]}`) |" if found else ""


def _switch(results: Mapping[str, Any]) -> str:
    """Say how well the switch does, as a row of the table; of a run without one nothing."""
    values = results.get("switch")
    return f"| {SwitchOutcome.of_values(values).line().replace(': ', ' | ', 1)} |\n" if values else ""


def _rows_seen(results: Mapping[str, Any]) -> str:
    """Say how long rows could be, and what of them was not learnt from, as rows of the table."""
    limits = results.get(as_trained.KEY, {})
    lines = (
        [f"| longest prompt, answer | {limits['max_source_length']}, {limits['max_target_length']} tokens |"]
        if limits
        else []
    )
    lines += [
        f"| {split} rows | {_in_cell(unseen_of(values).line())} |"
        for split, values in results.get("unseen", {}).items()
    ]
    return "".join(f"\n{line}" for line in lines)


def _in_cell(text: str) -> str:
    """Keep names of columns, which may be anything, inside their cell."""
    return " ".join(text.replace("|", "\\|").split())


def _changes(results: Mapping[str, Any]) -> str:
    """Say which settings were others at first; `config.yaml` holds the last ones."""
    return "".join(
        f"\nSettings changed after step {entry['after_step']}: {'; '.join(entry['changes'])}."
        for entry in results.get("changed_settings", ())
    )


def _usage(tune: str, base: str, method: str | None, embeddings: str | None) -> str:
    options = "" if method is None else f', quantization="{method}"'
    options += "" if embeddings is None else f', quantization_embeddings="{embeddings}"'
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
            encoding="utf-8",
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
