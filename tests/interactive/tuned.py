"""What was tuned on `glm-tiny`, and a model that knows tools: real files, random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from glmtune.models.checkpoints.config import native_config
from glmtune.models.load import build_model, load_official
from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.load import load_tokenizer_folder
from glmtune.prefix.checkpoint import PrefixMeta, save_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from tests.e2e.conftest import official_config
from tests.inference.engine.requests import write_lora

GOLDEN_TOKENIZERS = Path(__file__).resolve().parents[1] / "golden" / "tokenizers"
TOOLS = [
    {
        "name": "get_weather",
        "description": "天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
]
CONTEXT = 2048


@dataclass(frozen=True)
class Tuned:
    """Folders of what was tuned."""

    prefix: Path
    lora: Path


def write_tuned(folder: Path) -> Tuned:
    """Write a prefix called `ads` and a LoRA called `low`, which both change the answers of `glm-tiny`."""
    model = load_official("glm-tiny")
    torch.manual_seed(1)
    encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=4)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.mul_(3)
    save_prefix(encoder, folder / "ads" / "last", meta=PrefixMeta(base_fingerprint=model.fingerprint()))
    return Tuned(folder / "ads", write_lora(model, folder / "low", seed=3))


def write_tools_base(folder: Path) -> tuple[Path, Path]:
    """Write a GLM-4 in miniature, complete with the golden tokenizer, and a file of `TOOLS`."""
    shutil.copytree(GOLDEN_TOKENIZERS / "glm4", folder)
    tokenizer = load_tokenizer_folder(folder, Family.GLM4)
    config = official_config(Family.GLM4, tokenizer, "float32") | {"seq_length": CONTEXT}
    torch.manual_seed(0)
    build_model(native_config(config, Family.GLM4)).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    file = folder / "tools.json"
    file.write_text(json.dumps(TOOLS), encoding="utf-8")
    return folder, file
