"""How many tokens a reply took, counted as OpenAI does: each prompt once, all its answers."""

from __future__ import annotations

from typing import Any

from glmtune.inference.requests.chat import Finished


class UsageCount:
    """Counts the tokens of a reply as its answers end."""

    def __init__(self, answers_per_prompt: int) -> None:
        """Answers come numbered, those of a prompt one after the other."""
        self._per_prompt = answers_per_prompt
        self._finished: dict[int, Finished] = {}

    def add(self, index: int, finished: Finished) -> None:
        """Count an answer that ended."""
        self._finished[index] = finished

    @property
    def json(self) -> dict[str, Any]:
        """OpenAI's ``usage``.

        Of ours is ``switch``, where one decided: ``on`` (the adapter applied), ``off``, or ``mixed`` (it
        differed between prompts).
        """
        firsts = [each for index, each in self._finished.items() if index % self._per_prompt == 0]
        num_prompt = sum(each.num_prompt_tokens for each in firsts)
        num_new = sum(each.num_new_tokens for each in self._finished.values())
        decided = {each.is_tuned for each in firsts} - {None}
        word = "mixed" if len(decided) > 1 else "on" if True in decided else "off"
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": sum(each.num_cached_tokens for each in firsts)},
        } | ({"switch": word} if decided else {})
