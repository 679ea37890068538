"""What was tuned, alone, with its strength or scale written into it: a file as training leaves one.

A LoRA adds (alpha / rank) * B * A, so a scale is another alpha, which every reader of PEFT's files obeys. A
prefix has log of its strength added to the scores of its columns; no keys and values do that for all queries,
so only glmtune's own file, whose metadata name it, can hold one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from glmtune.adapter.load import ADAPTER_CONFIG, adapter_files
from glmtune.prefix.checkpoint import describe_prefix, save_prefix
from glmtune.prefix.encoder import PrefixEncoder
from glmtune.storage.files import write_json
from glmtune.storage.json_files import read_json_object
from glmtune.storage.manifest import read_manifest, write_manifest
from glmtune.switch.files import SWITCH_FILE

KEPT = ("base_fingerprint", "trained_with")
"""Of a checkpoint's manifest: which base an adapter belongs to, how it is asked; the rest is of its run."""


def write_tuned_prefix(encoder: PrefixEncoder, saved: Path, folder: Path) -> int:
    """Write a prefix into glmtune's own file.

    Args:
        encoder: the prefix, its strength in it.
        saved: the file it was read from, which tells of its making.
        folder: where to.

    Returns:
        Bytes written.
    """
    return save_prefix(encoder, folder, meta=describe_prefix(saved).meta).stat().st_size


def write_tuned_adapter(saved: Path, folder: Path, scale: float) -> int:
    """Write a LoRA as PEFT reads it, its alpha times a scale; the matrices are copied, and so is its switch.

    Args:
        saved: folder of the adapter.
        folder: where to, there.
        scale: above 0.

    Returns:
        Bytes of the weights.
    """
    config_file, weights = adapter_files(saved)
    values = read_json_object(config_file)
    values["lora_alpha"] = _times(values.get("lora_alpha", 8), scale)  # 8: PEFT's own where a file names none
    if patterns := values.get("alpha_pattern"):
        values["alpha_pattern"] = {name: _times(alpha, scale) for name, alpha in patterns.items()}
    shutil.copyfile(weights, folder / weights.name)
    if (saved / SWITCH_FILE).is_file():  # it reads the base alone: the scale changes nothing of it
        shutil.copyfile(saved / SWITCH_FILE, folder / SWITCH_FILE)
    write_json(folder / ADAPTER_CONFIG, values)
    facts = read_manifest(saved) or {}
    write_manifest(folder, {name: facts[name] for name in KEPT if name in facts})
    return weights.stat().st_size


def _times(alpha: Any, scale: float) -> float:
    """Multiply; a whole number stays one, as some readers of PEFT's files want it."""
    product = float(alpha) * scale
    return int(product) if product.is_integer() else product
