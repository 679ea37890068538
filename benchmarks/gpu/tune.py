"""Peak memory and speed of a real training run, beside what `glmtune plan` says and what was published.

    python -m benchmarks.gpu.tune --case ptuning-int4 --device cuda

Everything is `glmtune train` (rows of the longest length, checkpoints, report) but the base, which is made of
random numbers on the device instead of being read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

import glmtune
import glmtune.loading
from benchmarks.gpu.worker import GIB, Figures, Peak, parse_words, seconds_since
from benchmarks.plan_accuracy import write_rows
from benchmarks.random_model import Shape, random_model
from glmtune.models.tokenizers import load as tokenizers
from glmtune.planning.estimate import CPU_LIBRARIES, Estimate, estimate
from glmtune.planning.geometry import read_geometry
from glmtune.planning.hardware import detect_hardware
from glmtune.planning.workload import workload_of
from glmtune.quantization.in_place import InPlaceQuantization
from glmtune.training.trainer import GlmTrainer
from recipes.train import COMMAND, run
from recipes.words.compose import load_settings

SHORT = ["data.max_source_length=64", "data.max_target_length=128"]
"""Lengths of the official scripts."""
SIXTEEN = ["trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=16"]
ONE_PASS = ["trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=1"]
CHECKPOINTING = ["trainer.gradient_checkpointing=true"]


CASES = {
    "ptuning-int4": ("+recipe=ptuning_official", *SHORT, *SIXTEEN, *CHECKPOINTING, "model.quantization=int4"),
    "ptuning-bf16": ("+recipe=ptuning_official", *SHORT, *ONE_PASS),
    "lora-bf16": ("+recipe=lora", *SHORT, *ONE_PASS),
    "full-bf16": ("+recipe=full", *SHORT, *ONE_PASS, *CHECKPOINTING),
}
"""Name → settings of `glmtune train`."""
WITHOUT_SAVE = ("full-bf16",)
"""Nothing is saved, as a checkpoint of all weights of 6B has 75 GB."""
STEPS = 3


class TrainedEnoughError(Exception):
    """All steps are done, and what follows would only write files."""


def write_source(folder: Path, shape: Shape) -> Path:
    """Write what `glmtune train` reads of a base beside its weights: config.json and a tokenizer."""
    source = folder / "chatglm2-random"
    source.mkdir()
    values = shape.official | {"architectures": ["ChatGLMModel"]}
    (source / "config.json").write_text(json.dumps(values))
    assets = Path(glmtune.__file__).parent / "assets" / "glm-tiny"
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(assets / name, source / name)
    return source


@contextlib.contextmanager
def made_on_the_device(shape: Shape, device: str) -> Generator[None]:
    """Let `load_base` make the base on its device instead of reading it.

    The tokenizer beside it is that of glm-tiny, which has far fewer ids than such a model has rows: damage in
    a release, without a meaning among random weights.
    """
    before, check = glmtune.loading.load_base, tokenizers._check_against_config

    def make(source: str, *, dtype: Any, quantization: str | None = None, **_: Any) -> Any:
        names = {None: torch.bfloat16, "auto": torch.bfloat16}
        chosen = names[dtype] if dtype in names else getattr(torch, str(dtype).removeprefix("torch."))
        model: Any = random_model(shape, quantization, device=device, dtype=chosen)
        model.source, model.stored_dtype = str(source), torch.bfloat16
        model.in_place_quantizer = InPlaceQuantization()
        return model

    glmtune.loading.load_base = make
    tokenizers._check_against_config = lambda *_: None
    try:
        yield
    finally:
        glmtune.loading.load_base, tokenizers._check_against_config = before, check


@contextlib.contextmanager
def timed_steps(device: str, *, saves: bool) -> Generator[list[float]]:
    """Note how long each forward and backward pass takes; stop in front of a checkpoint that is too large."""
    passes: list[float] = []
    step, save = GlmTrainer.training_step, GlmTrainer._save_checkpoint

    def noting(self: Any, *args: Any, **values: Any) -> Any:
        start = time.perf_counter()
        found = step(self, *args, **values)
        passes.append(seconds_since(start, device))
        return found

    def stop(self: Any, *args: Any, **values: Any) -> Any:
        raise TrainedEnoughError

    GlmTrainer.training_step = noting
    if not saves:
        GlmTrainer._save_checkpoint = stop
    try:
        yield passes
    finally:
        GlmTrainer.training_step, GlmTrainer._save_checkpoint = step, save


def settings_of(case: str, source: Path, work: Path, device: str, is_tiny: bool) -> Any:
    """Return the settings of `glmtune train`."""
    words = [
        *CASES[case],
        f"model.source={source}",
        f"model.device={device}",
        "retention=null",
        "data=files",
        f"data.train_file={work / 'rows.jsonl'}",
        f"trainer.max_steps={2 if is_tiny else STEPS}",
        "trainer.logging_steps=1",
        "trainer.learning_rate=1e-4",
        "trainer.report_to=[]",
        f"output_dir={work / 'run'}",
        "resume=never",
    ]
    words += ["trainer.gradient_accumulation_steps=2"] * (is_tiny and "ptuning_official" in words[0])
    return load_settings(COMMAND, words)


def planned(config: Any, device: str) -> Estimate:
    """Return what `glmtune plan` says of these settings on this device."""
    geometry = read_geometry(config.model.source)
    return estimate(workload_of(config, geometry, detect_hardware(device)))


def main() -> int:
    """Measure one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", required=True, choices=CASES)
    options = parse_words(parser)
    case, device, figures = options.case, options.device, Figures(options.out)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_rows(work / "rows.jsonl")
        source = write_source(work, options.sizes.shape)
        config = settings_of(case, source, work, device, options.dry_run)
        plan = planned(config, device)
        libraries = CPU_LIBRARIES if device == "cpu" else 0.0
        figures.add(planned_gib=(plan.device.total - libraries) / GIB, moment=plan.moment)
        there = detect_hardware(device).device_bytes
        if plan.device.total > there:
            figures.add(skipped=f"{plan.device.total / GIB:.1f} GiB planned, {there / GIB:.1f} GiB are there")
            return 0
        peak = Peak(device)
        before = peak.tensors if device == "cpu" else 0
        with (
            made_on_the_device(options.sizes.shape, device),
            timed_steps(device, saves=case not in WITHOUT_SAVE) as passes,
        ):
            with contextlib.suppress(TrainedEnoughError):
                figures.add(loss=run(config).results.get("train_loss"))
        tensors, taken = peak.tensors - before, peak.taken - before
    figures.add(measured_gib=taken / GIB, tensors_gib=tensors / GIB, passes=len(passes))
    figures.add(pass_seconds=sorted(passes)[len(passes) // 2])
    figures.add(estimated_over_measured=(plan.device.total - libraries) / max(taken, 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
