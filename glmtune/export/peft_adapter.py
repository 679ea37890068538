"""A LoRA adapter as PEFT, vLLM and llama.cpp read one for a model in transformers' format.

    names      base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   (and lora_B)
    settings   one rank, one alpha; no patterns by layer, no root of the rank

transformers' GLM has one ``gate_up_proj``; in vLLM's class for glm4 (and that for glm of its older versions)
its halves are two layers, and an adapter of the whole is refused. So where that layer is adapted, a second
folder lies inside, ``vllm``, with the halves apart.

What several tools ignore silently is not written but worked into the matrices: ranks that differ are filled
up with rows of zeros, scales that differ are multiplied into B. An adapter that was trained on the fused
layer of the official layout is on the three of this one: they share its A, and each has its rows of B.

Sources:
    ``peft/tuners/lora/config.py`` (what PEFT reads), ``vllm/lora/peft_helper.py`` (no patterns),
    ``convert_lora_to_gguf.py`` of llama.cpp (``lora_alpha`` alone).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from glmtune.adapter.load import ADAPTER_FILE, PEFT_PREFIX
from glmtune.storage.files import write_json
from glmtune.storage.json_files import read_json_object
from glmtune.storage.manifest import read_manifest, write_manifest
from glmtune.tuned_files import ADAPTER_CONFIG

SETTINGS: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "bias": "none",
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""What every such file says; readers of several years ask for one or the other of these keys."""


FUSED, HALVES = "gate_up_proj", ("gate_proj", "up_proj")
"""transformers' layer, and what vLLM calls its rows: those of the gate first."""
VLLM_FOLDER = "vllm"


def write_peft_adapter(adapted: PeftModel, saved: Path, folder: Path) -> int:
    """Write the adapter of a model.

    Args:
        adapted: with the adapter, whose layers have the names that transformers gives them; its scale, as set
            by `glmtune.adapter.load.set_scale`, is written, too.
        saved: folder that the adapter was read from, which names its base.
        folder: where to, there.

    Returns:
        Bytes of the weights, those of the second folder aside.
    """
    model: nn.Module = cast(Any, adapted).get_base_model()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    adapter = next(iter(adapted.peft_config))
    rank = max(layer.r[adapter] for layer in layers.values())
    scales = {name: float(layer.scaling[adapter]) for name, layer in layers.items()}
    shared = next(iter(scales.values())) if len(set(scales.values())) == 1 else None
    weights: dict[str, Tensor] = {}
    for name, layer in layers.items():
        parts: list[Any] = [layer.lora_A[adapter], layer.lora_B[adapter]]
        down, up = (part.weight.detach().float() for part in parts)
        missing = rank - down.shape[0]  # rows of zeros in A and columns of zeros in B add nothing
        weights[f"{PEFT_PREFIX}{name}.lora_A.weight"] = F.pad(down, (0, 0, 0, missing)).clone()
        scaled = up if shared is not None else up * scales[name]
        weights[f"{PEFT_PREFIX}{name}.lora_B.weight"] = F.pad(scaled, (0, missing)).clone()
    alpha = rank * (1.0 if shared is None else shared)
    values = SETTINGS | {
        "base_model_name_or_path": read_json_object(saved / ADAPTER_CONFIG).get("base_model_name_or_path"),
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": _targets(layers, [name for name, _ in model.named_modules()]),
    }
    _write(folder, weights, values)
    if any(name.endswith(f".{FUSED}") for name in layers):
        _write(folder / VLLM_FOLDER, *_with_halves(weights, values))
    facts = read_manifest(saved) or {}
    write_manifest(folder, {name: facts[name] for name in ("base_fingerprint",) if name in facts})
    return (folder / ADAPTER_FILE).stat().st_size


def _write(folder: Path, weights: dict[str, Tensor], values: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / ADAPTER_FILE, metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, values)


def _with_halves(
    weights: dict[str, Tensor], values: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter with the halves of the fused layer as two: both have its A, each its rows of B."""
    halved: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if f".{FUSED}." not in name:
            halved[name] = weight
            continue
        parts = (weight, weight) if ".lora_A." in name else weight.chunk(2)
        halved |= {
            name.replace(FUSED, half): part.contiguous().clone()
            for half, part in zip(HALVES, parts, strict=True)
        }
    targets = [
        target.replace(FUSED, half)
        for target in values["target_modules"]
        for half in (HALVES if target.endswith(FUSED) else ("",))
    ]
    return halved, values | {"target_modules": sorted(targets)}


def read_by_peft(folder: Path, config: dict[str, Any], *, build: Any) -> PreTrainedModel:
    """Read an adapter as its users will: PEFT's own loader on transformers' own class.

    Args:
        folder: the adapter.
        config: content of the config.json that the base has in transformers' format.
        build: calls a function that makes a model, such that its weights are placeholders.

    Returns:
        The adapted model, the base's weights to be filled in.
    """
    values = {name: value for name, value in config.items() if name != "model_type"}
    native = AutoConfig.for_model(config["model_type"], **values)
    model = build(lambda: AutoModelForCausalLM.from_config(native, dtype=torch.float32))
    return cast(PreTrainedModel, PeftModel.from_pretrained(model, str(folder)).eval())


def _targets(adapted: Collection[str], names: Collection[str]) -> list[str]:
    """Return ends of layers' names, where all layers of that end are adapted; else whole names."""
    ends = {name.rpartition(".")[2] for name in adapted}
    meant = {name for name in names if name.rpartition(".")[2] in ends}
    return sorted(ends if meant == set(adapted) else adapted)
