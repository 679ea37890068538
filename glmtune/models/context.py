"""How many tokens a model takes, from its config.json alone: as a rule without weights and PyTorch."""

from __future__ import annotations

from pathlib import Path

from glmtune.models.checkpoints.config_rules import read_config, stored_context_tokens
from glmtune.models.releases.source import resolve_source


def context_tokens(source: str | Path, family: str | None = None) -> int:
    """Return the positions of a model: prompt and answer together.

    Args:
        source: preset name, hub id or folder.
        family: release line, only where no name tells it.

    Raises:
        ConfigError: unknown source or family.
        CheckpointError: there is no config.json, or one that cannot be used.
    """
    folder = resolve_source(source)
    if (stored := stored_context_tokens(read_config(folder))) is not None:
        return stored
    # A folder in transformers' format may leave it to transformers' default; an official one is refused.
    from glmtune.models.load import load_config

    return load_config(source, folder, family).max_position_embeddings
