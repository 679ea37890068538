"""Compare `glmtune plan` with the peak memory of real runs of `glmtune train` on the CPU.

One process imports everything and trains a tiny model in every way, so that code and caches are there. Every
case is then measured in a process forked from it: real training on rows of exactly the longest length that
the settings allow. Measured is the peak of resident memory (`ru_maxrss`) above what was held at the fork; the
estimate is that of `glmtune.planning` for the same settings, without its constant for libraries.

    python benchmarks/plan_accuracy.py --work /tmp/plan_accuracy

The checkpoints (random weights) are made on the way; `--only PATTERN` runs some of the cases.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import glmtune

SHAPES = {
    "8m": {"layers": 4, "hidden": 256, "ffn": 688, "heads": 8, "kv-heads": 2, "head-dim": 32, "vocab": 8192},
    "34m": {
        "layers": 8,
        "hidden": 512,
        "ffn": 1376,
        "heads": 8,
        "kv-heads": 2,
        "head-dim": 64,
        "vocab": 8192,
    },
    "124m": {
        "layers": 12,
        "hidden": 768,
        "ffn": 2048,
        "heads": 12,
        "kv-heads": 2,
        "head-dim": 64,
        "vocab": 32000,
    },
    "253m": {
        "layers": 16,
        "hidden": 1024,
        "ffn": 2736,
        "heads": 16,
        "kv-heads": 2,
        "head-dim": 64,
        "vocab": 32000,
    },
    "520m": {
        "layers": 20,
        "hidden": 1280,
        "ffn": 3424,
        "heads": 20,
        "kv-heads": 2,
        "head-dim": 64,
        "vocab": 65024,
    },
    "first-157m": {"layers": 8, "hidden": 768, "ffn": 3072, "heads": 12},
}
"""Name -> options of `benchmarks/make_checkpoint.py`."""
TINY_ROWS = 4864
"""Rows of glm-tiny's embedding, some of them unused."""

PREFIX, LORA, FULL = "+recipe=ptuning", "+recipe=lora", "+recipe=full"
CASES: dict[str, tuple[str, list[str]]] = {
    "34m full 4x193": ("34m", [FULL, "rows=4", "source=64", "target=128"]),
    "34m prefix 4x256": ("34m", [PREFIX, "rows=4", "source=128", "target=127"]),
    "34m lora 4x256": ("34m", [LORA, "rows=4", "source=128", "target=127"]),
    "34m full 1x1024": ("34m", [FULL, "rows=1", "source=512", "target=511"]),
    "34m full 1x1024 checkpointing": ("34m", [FULL, "rows=1", "source=512", "target=511", "checkpointing"]),
    "124m full 2x193": ("124m", [FULL, "rows=2", "source=64", "target=128"]),
    "124m prefix 2x256": ("124m", [PREFIX, "rows=2", "source=128", "target=127"]),
    "124m prefix 2x256 checkpointing": (
        "124m", [PREFIX, "rows=2", "source=128", "target=127", "checkpointing"],
    ),
    "124m lora 2x256": ("124m", [LORA, "rows=2", "source=128", "target=127"]),
    "124m lora 2x256 checkpointing": ("124m", [LORA, "rows=2", "source=128", "target=127", "checkpointing"]),
    "124m full 1x256 accumulation 2": (
        "124m", [FULL, "rows=1", "source=128", "target=127", "accumulation=2"],
    ),
    "124m full 2x193 bf16 autocast": (
        "124m", [FULL, "rows=2", "source=64", "target=128", "trainer.precision=bf16"],
    ),
    "124m prefix 1x512 int4": ("124m", [PREFIX, "rows=1", "source=256", "target=255", "quantization=int4"]),
    "124m prefix 1x512 int4-e8": (
        "124m",
        [PREFIX, "rows=1", "source=256", "target=255", "quantization=int4", "quantization_embeddings=int8"],
    ),
    "253m prefix 1x512": ("253m", [PREFIX, "rows=1", "source=256", "target=255"]),
    "253m lora 1x512 checkpointing": ("253m", [LORA, "rows=1", "source=256", "target=255", "checkpointing"]),
    "253m full 1x128": ("253m", [FULL, "rows=1", "source=64", "target=63"]),
    "520m lora 1x193": ("520m", [LORA, "rows=1", "source=64", "target=128"]),
    "520m prefix 1x193 checkpointing": (
        "520m", [PREFIX, "rows=1", "source=64", "target=128", "checkpointing"],
    ),
    "520m full 1x128 adafactor": (
        "520m", [FULL, "rows=1", "source=64", "target=63", "trainer.optim=adafactor"],
    ),
    "520m full 1x128": ("520m", [FULL, "rows=1", "source=64", "target=63"]),
    "first-157m full 1x193": ("first-157m", [FULL, "rows=1", "source=64", "target=128"]),
    "first-157m prefix 2x193": ("first-157m", [PREFIX, "rows=2", "source=64", "target=128"]),
}  # fmt: skip
"""Name -> shape and settings; short words are spelt out by `overrides`."""

WORDS = {
    "rows": "trainer.per_device_train_batch_size",
    "source": "data.max_source_length",
    "target": "data.max_target_length",
    "accumulation": "trainer.gradient_accumulation_steps",
}
STEPS = 2


def overrides(settings: list[str], model: Path, data: Path, out: Path) -> list[str]:
    """Spell out the settings of a case as overrides of `glmtune train` and `glmtune plan`."""
    words = [setting.partition("=") for setting in settings]
    spelt = [f"{WORDS.get(key, key)}={value}" for key, _, value in words if value]
    if "checkpointing" in settings:
        spelt.append("trainer.gradient_checkpointing=true")
    if not any(key == "accumulation" for key, _, _ in words):
        spelt.append("trainer.gradient_accumulation_steps=1")
    return [
        *spelt,
        f"model={model}",
        "model.device=cpu",
        "data=files",
        f"data.train_file={data}",
        "data.on_bad_row=error",
        f"trainer.max_steps={STEPS}",
        "trainer.save_steps=1000",
        "trainer.logging_steps=1",
        "trainer.learning_rate=1e-4",
        "trainer.report_to=[]",
        f"output_dir={out}",
        "resume=never",
    ]


def make_model(work: Path, shape: str, ice_text: Path | None = None) -> Path:
    """Write a checkpoint of random weights, once, with glm-tiny's tokenizer (later generations)."""
    is_first = shape.startswith("first")
    folder = work / (f"chatglm-{shape}" if is_first else f"chatglm2-{shape}")
    if (folder / "config.json").is_file():
        return folder
    options = [item for key, value in SHAPES[shape].items() for item in (f"--{key}", str(value))]
    options += ["--family", "chatglm" if is_first else "chatglm2", "--out", str(folder)]
    options += ["--dtype", "float32", "--format", "safetensors"]
    assets = Path(glmtune.__file__).parent / "assets" / "glm-tiny"
    options += ["--tokenizer", str(ice_text)] if is_first else []
    script = Path(__file__).with_name("make_checkpoint.py")
    subprocess.run([sys.executable, str(script), *options], check=True)
    if not is_first:
        shutil.copy(assets / "tokenizer_config.json", folder / "tokenizer_config.json")
        write_tokenizer(assets / "tokenizer.model", folder / "tokenizer.model", SHAPES[shape]["vocab"])
    return folder


def write_tokenizer(source: Path, target: Path, rows: int) -> None:
    """Write glm-tiny's vocabulary with pieces that no text has, enough for a model with so many rows."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(source.read_bytes())
    for number in range(rows - TINY_ROWS):
        model.pieces.add(piece=f"<no text has {number}>", score=-1000.0)
    target.write_bytes(model.SerializeToString())


def write_rows(file: Path) -> Path:
    """Write rows long enough to be cut to the longest length in any case."""
    sums = [f"{a}+{b}={a + b} " for a in range(10, 60) for b in range(10, 60)]
    with file.open("w", encoding="utf-8") as stream:
        for number in range(64):
            text = "".join(sums[number:])
            row = {"prompt": text[:4000], "response": text[5000 : 5000 + 4000]}
            stream.write(json.dumps(row) + "\n")
    return file


def resident_bytes() -> int:
    """Return the memory this process holds now."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


def train(settings: list[str], model: Path, work: Path, name: str) -> Any:
    """Train once in this process and return the settings."""
    from recipes.train import COMMAND, run
    from recipes.words.compose import load_settings

    config = load_settings(COMMAND, overrides(settings, model, work / "rows.jsonl", work / name))
    run(config)
    return config


def warm_up(work: Path) -> None:
    """Train the smallest model in every way."""
    for number, recipe in enumerate((FULL, PREFIX, LORA)):
        train([recipe, "rows=2", "source=16", "target=16"], make_model(work, "8m"), work, f"warm{number}")


def measure(case: str, work: Path) -> dict[str, Any]:
    """Train in a forked process and return peak and estimate, bytes."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            os.write(writer, json.dumps(_measured(case, work)).encode())
            os._exit(0)
        except BaseException as error:  # the parent reports it
            os.write(writer, json.dumps({"case": case, "error": repr(error)}).encode())
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.wait()
    return json.loads(text or json.dumps({"case": case, "error": "killed"}))


def _measured(case: str, work: Path) -> dict[str, Any]:
    from glmtune.planning.estimate import CPU_LIBRARIES, estimate
    from glmtune.planning.geometry import read_geometry
    from glmtune.planning.hardware import detect_hardware
    from glmtune.planning.workload import workload_of

    shape, settings = CASES[case]
    before = resident_bytes()
    config = train(settings, make_model(work, shape), work, "run")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    geometry = read_geometry(config.model.source)
    plan = estimate(workload_of(config, geometry, detect_hardware("cpu")))
    return {
        "case": case,
        "parameters": geometry.num_parameters,
        "baseline": before,
        "measured": peak - before,
        "estimated": plan.device.total - CPU_LIBRARIES,
        "moment": plan.moment,
        "moments": plan.moments,
        "parts": {name: getattr(plan.device, name) for name in plan.device.__slots__},
    }


def main() -> None:
    """Run the cases one after the other, each in a process of its own, and print the table."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, rows and runs")
    parser.add_argument(
        "--ice-text", type=Path, help="ChatGLM-6B's ice_text.model; without it no first generation"
    )
    parser.add_argument("--only", default=".", help="regular expression on the names of cases")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    chosen = [case for case in CASES if re.search(options.only, case)]
    chosen = [case for case in chosen if options.ice_text or not case.startswith("first")]
    for shape in {"8m", *(CASES[case][0] for case in chosen)}:
        make_model(options.work, shape, options.ice_text)
    write_rows(options.work / "rows.jsonl")
    warm_up(options.work)
    results = []
    for case in chosen:
        found = measure(case, options.work)
        sys.stderr.write(json.dumps(found) + "\n")
        if "error" not in found:
            results.append(found)
    sys.stdout.write(table(results))


def table(results: list[dict[str, Any]]) -> str:
    """Lay the results out in Markdown, MiB."""
    lines = ["| run | measured | estimated | estimated / measured | peak at |", "|---|---|---|---|---|"]
    for row in results:
        measured, estimated = row["measured"] / 2**20, row["estimated"] / 2**20
        cells = (
            row["case"],
            f"{measured:,.0f}",
            f"{estimated:,.0f}",
            f"{estimated / measured:.3f}",
            row["moment"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
