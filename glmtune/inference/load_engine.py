"""From names to a running engine that is asked in messages: what chat, server and web page begin with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from glmtune.inference.engine.engine import Engine
from glmtune.inference.engine.plain import check_engine_computes
from glmtune.inference.load_draft import load_draft
from glmtune.inference.requests.chat import ChatEngine
from glmtune.inference.settings import DraftSettings, EngineSettings
from glmtune.loading import load_base, load_tokenizer
from glmtune.models.settings import ModelSettings
from glmtune.quantization.kernels.dispatch import prepare_for_inference


def load_engine(
    model: ModelSettings,
    *,
    prefixes: Mapping[str, str | Path] | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    settings: EngineSettings | None = None,
    use_switch: bool = True,
    draft: DraftSettings | None = None,
) -> ChatEngine:
    """Load a model and what was tuned; the engine is not started yet.

    Args:
        model: which one, and how.
        prefixes: tuned prefixes by the name that requests give.
        adapters: LoRA adapters by name.
        settings: how the engine computes.
        use_switch: obey the switches of what was tuned.
        draft: a smaller model that drafts tokens, if any.

    Raises:
        GlmtuneError: the model cannot be loaded, or what was tuned does not belong to it: file and reason.
    """
    tokenizer = load_tokenizer(model.source, family=model.family)
    loaded = load_base(
        model.source,
        dtype=model.dtype,
        **model.where,
        family=model.family,
        quantization=model.method,
        quantization_embeddings=model.quantization_embeddings,
    )
    prepare_for_inference(loaded, activations=model.quantization_activations)
    check_engine_computes(loaded)
    engine = Engine(loaded, settings, None if draft is None else load_draft(draft, model))
    for name, path in (prefixes or {}).items():
        engine.add_adapter(name, path, kind="prefix", use_switch=use_switch)
    for name, path in (adapters or {}).items():
        engine.add_adapter(name, path, kind="lora", use_switch=use_switch)
    return ChatEngine(engine, tokenizer)
