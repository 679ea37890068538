"""The same model with its blocks' linear layers quantized by other libraries, on the device."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

# PyTorch comes in the functions: what starts the parts asks only whether a package is there, and each process
# that it spawns imports this file again.
if TYPE_CHECKING:
    from torch import nn

RIVALS = {"nf4": "bitsandbytes", "torchao-int4": "torchao"}
"""Method → the package that computes it."""


def missing(method: str) -> str:
    """Say why a method cannot be measured here; "" if it can."""
    package = RIVALS[method]
    return "" if importlib.util.find_spec(package) else f"{package} is not installed (pip install {package})"


def quantize_by(method: str, model: nn.Module, device: str) -> str:
    """Let a library quantize the linear layers of all blocks; embedding and head stay, as with our methods.

    Returns:
        Library, version and format.
    """
    version = f"{RIVALS[method]} {importlib.metadata.version(RIVALS[method])}"
    blocks: Any = model.get_submodule("model.layers")
    return f"{version}, {_nf4(blocks, device) if method == 'nf4' else _torchao(blocks, device)}"


def _nf4(blocks: nn.Module, device: str) -> str:
    import bitsandbytes as bnb
    from torch import nn

    layers = [(name, module) for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
    for name, old in layers:
        new = bnb.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=old.weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        options = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": True}
        # From host memory, as bitsandbytes quantizes while a weight moves to its device.
        new.weight = bnb.nn.Params4bit(old.weight.detach().cpu(), **options).to(device)
        new.bias = old.bias
        parent, _, leaf = name.rpartition(".")
        setattr(blocks.get_submodule(parent), leaf, new)
    return "NF4, double quantization"


def _torchao(blocks: nn.Module, device: str) -> str:
    import torch
    from torchao.quantization import quantize_

    from glmtune.quantization.files.external import quantizer_config

    method = "torchao-int4" if device == "cuda" else "torchao-int8"  # its INT4 is for GPUs: so a dry run
    quantize_(blocks, quantizer_config(method, torch.bfloat16).quant_type)
    return "INT4, groups of 128, tiles of PyTorch's product" if device == "cuda" else "INT8"
