"""The model inside PEFT's wrapper, for code that needs the decoder stack or the embeddings themselves."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrapped(model: nn.Module) -> Any:
    """Return the causal LM inside what PEFT wrapped, its layers still adapted; any other model as it is.

    Told by PEFT's method rather than by its class: importing PEFT takes a second, and only LoRA needs it.
    ``base_model`` would not do: transformers gives every model an attribute of that name, the decoder stack.

    Args:
        model: a causal LM, wrapped by PEFT or not.
    """
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()
