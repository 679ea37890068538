"""Beginnings that were read, kept while prompts with them are being answered."""

from __future__ import annotations

from collections.abc import Sequence

from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.prompt_groups import SharedPrefix, common_length


class PrefixStore:
    """Reads each beginning once; a nested one continues the longest that is still known.

    Only the beginnings on the way from the first token to the latest one are kept, so memory stays that of
    a few prompts.
    """

    def __init__(self, model: EngineModel) -> None:
        """Start empty."""
        self._model = model
        self._path: list[SharedPrefix] = []

    def get(self, token_ids: Sequence[int]) -> SharedPrefix:
        """Return a beginning, reading what is not known of it; nothing for no tokens."""
        self._path = [known for known in self._path if _begins(token_ids, known.token_ids)]
        parent = self._path[-1] if self._path else SharedPrefix()
        if len(parent.token_ids) == len(token_ids):
            return parent
        self._path.append(self._model.read_shared(token_ids, parent))
        return self._path[-1]


def _begins(token_ids: Sequence[int], first: Sequence[int]) -> bool:
    return len(first) <= len(token_ids) and common_length(token_ids, first) == len(first)
