"""Fine-tune and evaluate the GLM family, natively on current PyTorch and transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from glmtune.version import __version__ as __version__

if TYPE_CHECKING:
    from glmtune.loading import load_model, load_tokenizer
    from glmtune.models.templates.renderer import render_prompt
    from glmtune.prefix.encoder import PrefixEncoder

__all__ = ["PrefixEncoder", "load_model", "load_tokenizer", "render_prompt"]

_HOMES = {
    "load_model": "glmtune.loading",
    "load_tokenizer": "glmtune.loading",
    "render_prompt": "glmtune.models.templates.renderer",
    "PrefixEncoder": "glmtune.prefix.encoder",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `glmtune --help` answers without importing torch.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'glmtune' has no attribute {name!r}")
