"""`torch.compile` for generation: what it needs, and which parts of a model it is given."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel

from glmtune.errors import ConfigError

BACKEND = "inductor"
"""The back end of `torch.compile`."""
MODES = {"cuda": "reduce-overhead"}
"""Device → mode of `torch.compile`; elsewhere its default."""
PARTS = ("mlp", "input_layernorm", "post_attention_layernorm")
"""Modules of a block that the engine compiles: those that see no keys and values, whose number changes."""


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
    config._compile_all_devices = True  # on CPUs, too
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
    unwrap = getattr(model, "get_base_model", None)
    base: Any = model if unwrap is None else unwrap()
    fresh = [
        part
        for block in base.base_model.layers
        for name in PARTS
        if (part := getattr(block, name))._compiled_call_impl is None
    ]
    for part in fresh:
        part.compile(dynamic=True, backend=BACKEND)
    return len(fresh)


def check_compiler(device: torch.device) -> None:
    """Refuse to go on where `torch.compile` has nothing to work with.

    Args:
        device: where the model is.

    Raises:
        ConfigError: no C++ compiler (CPU), no Triton (CUDA).
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigError(
                "`compile` is true, but torch.compile needs Triton on a GPU, and there is none that works "
                "here. Run `pip install triton` (Linux), or leave `compile` out."
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ConfigError(
            "`compile` is true, but torch.compile needs a C++ compiler on a CPU, and there is none. Install "
            "one (`apt-get install g++`), name yours in the environment variable CXX, or leave `compile` out."
        ) from None
