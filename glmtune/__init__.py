"""Fine-tune and evaluate the GLM family, natively on current PyTorch and transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from glmtune.compat import auto_classes
from glmtune.version import __version__ as __version__

if TYPE_CHECKING:
    from glmtune.compat.chat_pipeline import pipeline
    from glmtune.inference.engine.engine import Engine
    from glmtune.inference.requests.chat import ChatEngine
    from glmtune.loading import load_model, load_model_on_gpus
    from glmtune.models.templates.renderer import render_prompt
    from glmtune.models.tokenizers.load import load_tokenizer
    from glmtune.prefix.encoder import PrefixEncoder

__all__ = [
    "ChatEngine",
    "Engine",
    "PrefixEncoder",
    "load_model",
    "load_model_on_gpus",
    "load_tokenizer",
    "pipeline",
    "render_prompt",
]

_HOMES = {
    "load_model": "glmtune.loading",
    "load_model_on_gpus": "glmtune.loading",
    "load_tokenizer": "glmtune.models.tokenizers.load",
    "Engine": "glmtune.inference.engine.engine",
    "ChatEngine": "glmtune.inference.requests.chat",
    "pipeline": "glmtune.compat.chat_pipeline",
    "render_prompt": "glmtune.models.templates.renderer",
    "PrefixEncoder": "glmtune.prefix.encoder",
}

# The one thing that importing glmtune does to other packages: official folders given to transformers' Auto
# classes are loaded here. Neither transformers nor torch is imported for it.
auto_classes.install()


def __dir__() -> list[str]:
    # Completion in a shell or notebook shows what there is, though nothing of it is loaded yet.
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `glmtune --help` answers without importing torch.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'glmtune' has no attribute {name!r}")
