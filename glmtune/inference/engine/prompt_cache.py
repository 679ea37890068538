"""The prompt cache: keys and values of shared prompts, kept while prompts with them are answered."""

from __future__ import annotations

from collections.abc import Sequence

from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.prompt_groups import SharedPrompt, common_length


class PromptCache:
    """Reads each shared prompt once; a nested one continues the longest that is still cached.

    Groups come in the order of their tree (`group_prompts`), so only the path from its root to the latest
    shared prompt is kept: memory stays that of a few prompts, however many groups there are.
    """

    def __init__(self, model: EngineModel) -> None:
        """Start empty."""
        self._model = model
        self._path: list[SharedPrompt] = []

    def get(self, token_ids: Sequence[int]) -> SharedPrompt:
        """Return a shared prompt, reading what is not cached of it; an empty one for no tokens."""
        self._path = [known for known in self._path if _begins(token_ids, known.token_ids)]
        parent = self._path[-1] if self._path else SharedPrompt()
        if len(parent.token_ids) == len(token_ids):
            return parent
        self._path.append(self._model.read_shared(token_ids, parent))
        return self._path[-1]


def _begins(token_ids: Sequence[int], first: Sequence[int]) -> bool:
    return len(first) <= len(token_ids) and common_length(token_ids, first) == len(first)
