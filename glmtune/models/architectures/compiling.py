"""`torch.compile`: what it needs, and which parts of a model it is given, for generation and for training.

Three uses: one decoding step of transformers' ``generate`` (`compiled_generation`), the parts of a block that
see no keys and values (`compile_parts`, the engine), whole blocks (`compile_layers`, training).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from glmtune.errors import ConfigError
from glmtune.models.architectures.unwrap import unwrapped

BACKEND = "inductor"
"""The back end of `torch.compile`."""
MODES = {"cuda": "reduce-overhead"}
"""Device → mode of `torch.compile`: CUDA graphs, as a step of one token spends its time launching kernels;
elsewhere the default."""
PARTS = (
    "mlp",
    "input_layernorm",
    "post_attention_layernorm",
    "post_self_attn_layernorm",
    "post_mlp_layernorm",
)
"""Modules of a block that the engine compiles, those that it has: they see no keys and values. The number of
these grows with every token, and each new shape would be compiled anew."""


def compiled_generation(device: torch.device) -> dict[str, Any]:
    """Return what transformers' ``generate`` is told to decode with compiled code.

    Keys and values then have a fixed place for every token to come, and one step is compiled, for all
    lengths; prompts are read as ever. The first answer waits for the compiler. Results change by rounding.

    Args:
        device: of the model.

    Returns:
        Settings of ``generate``.

    Raises:
        ConfigError: there is nothing to compile with.
    """
    check_compiler(device)
    config: Any = CompileConfig(backend=BACKEND, dynamic=True, mode=MODES.get(device.type, "default"))
    config._compile_all_devices = True  # transformers 5 compiles on GPUs alone unless told so
    return {"cache_implementation": "static", "compile_config": config}


def compile_parts(model: PreTrainedModel) -> int:
    """Let the norms and MLPs of every block be compiled when they first run; attention stays as it is.

    Args:
        model: a causal LM, wrapped by PEFT or not; mutated.

    Returns:
        Number of modules; those done before are not counted.

    Raises:
        ConfigError: there is nothing to compile with.
    """
    check_compiler(model.device)
    fresh = [
        part
        for block in unwrapped(model).base_model.layers
        for name in PARTS
        if (part := getattr(block, name, None)) is not None and part._compiled_call_impl is None
    ]
    for part in fresh:
        part.compile(dynamic=True, backend=BACKEND)
    return len(fresh)


def compile_layers(model: nn.Module, *, setting: str = "trainer.torch_compile") -> int:
    """Let whole blocks be compiled when they first run, for training: lengths and batch sizes stay open.

    In place, so that names, weights and checkpoints stay as they are. Layers of one kind share their compiled
    code, so deep models compile no longer than shallow ones.

    Args:
        model: mutated.
        setting: what the user set to ask for it, for the error.

    Returns:
        Number of layers.

    Raises:
        ConfigError: there is nothing to compile with.
    """
    check_compiler(next(model.parameters()).device, setting=setting)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def check_compiler(device: torch.device, *, setting: str = "compile") -> None:
    """Refuse to go on where `torch.compile` has nothing to work with.

    PyTorch itself would only say so in the middle of the first forward pass, from deep inside the compiler.

    Args:
        device: where the model is.
        setting: what the user set to ask for it, for the error.

    Raises:
        ConfigError: no C++ compiler (CPU), no Triton (CUDA).
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigError(
                f"`{setting}` is true, but torch.compile needs Triton on a GPU, and there is none that works "
                f"here. Run `pip install triton` (Linux), or leave `{setting}` out."
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ConfigError(
            f"`{setting}` is true, but torch.compile needs a C++ compiler on the device `cpu`, and there is "
            "none. Install a C++ compiler (`apt-get install g++`), name yours in the environment variable "
            f"CXX, or leave `{setting}` out."
        ) from None
