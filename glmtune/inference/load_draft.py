"""A smaller model that drafts tokens for the one that answers: from settings to the loaded model."""

from __future__ import annotations

from glmtune.inference.engine.model import Drafting
from glmtune.inference.settings import DraftSettings
from glmtune.loading import load_base
from glmtune.models.settings import ModelSettings
from glmtune.quantization.kernels.dispatch import prepare_for_inference


def load_draft(settings: DraftSettings, model: ModelSettings) -> Drafting | None:
    """Load the model that drafts, None where none is asked for.

    Args:
        settings: which one.
        model: the one that answers: the other goes to the same device, in the same type.

    Raises:
        GlmtuneError: it cannot be loaded.
    """
    if settings.source is None:
        return None
    loaded = load_base(settings.source, dtype=model.dtype, **model.where, quantization=settings.quantization)
    prepare_for_inference(loaded)
    return Drafting(loaded, settings.num_tokens)
