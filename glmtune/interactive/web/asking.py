"""From what is chosen on the page to what the model is asked with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glmtune.errors import ConfigError, DataError
from glmtune.inference.requests.sampling import Sampling
from glmtune.interactive.answerer import Answerer, AnswerStream, SamplingChoice
from glmtune.interactive.conversation import Conversation
from glmtune.interactive.web.answering import Ask
from glmtune.storage.json_files import parse_json

MAX_STRENGTH = 2.0


@dataclass(frozen=True, slots=True)
class Choices:
    """What is chosen on the page; values of a browser, so of any kind until `Asker` has read them."""

    adapter: object
    strength: object
    compare: object
    system: object
    tools: object
    keeps_defaults: object
    max_new_tokens: object
    temperature: object
    top_p: object
    top_k: object
    repetition_penalty: object
    seed: object


class Asker:
    """Asks conversations with the choices of a page."""

    def __init__(self, answerer: Answerer, choices: Choices) -> None:
        """Read the choices.

        Raises:
            ConfigError: a value that no control gives.
            DataError: the tools are no list of descriptions in JSON.
        """
        self._answerer = answerer
        there = {each.name: each for each in answerer.adapters}
        self._adapter = choices.adapter if isinstance(choices.adapter, str) else ""
        if self._adapter and self._adapter not in there:
            raise ConfigError(f"There is no prefix and no LoRA `{self._adapter}` any more. Reload the page.")
        has_one = bool(self._adapter) and there[self._adapter].has_strength
        self._strength = _number("strength", choices.strength, MAX_STRENGTH) if has_one else 1.0
        self.compares = bool(choices.compare) and bool(self._adapter)
        self.system = choices.system.strip() if isinstance(choices.system, str) else ""
        self._tools = _read_tools(choices.tools) if answerer.knows_tools else ()
        self._sampling: dict[str, Any] = {} if choices.keeps_defaults else _sampling(choices)

    def tuned(self, conversation: Conversation) -> Ask:
        """Ask with what is chosen."""
        return self._ask(conversation, self._adapter, self._strength)

    def base(self, conversation: Conversation) -> Ask:
        """Ask the base alone, with the same sampling."""
        return self._ask(conversation, "", 1.0)

    def _ask(self, conversation: Conversation, adapter: str, strength: float) -> Ask:
        messages = conversation.messages

        def ask(sampling: SamplingChoice) -> AnswerStream:
            return self._answerer.answer(
                messages, sampling=sampling, adapter=adapter, strength=strength, tools=self._tools
            )

        def ask_what_fits() -> AnswerStream:
            """Take the longest answer for what it is called where the context leaves less than that."""
            try:
                return ask(self._sampling)
            except ConfigError:
                shorter = {name: value for name, value in self._sampling.items() if name != "max_new_tokens"}
                if len(shorter) == len(self._sampling):
                    raise
                return ask(shorter)

        return ask_what_fits


def _sampling(choices: Choices) -> dict[str, Any]:
    seed = None if choices.seed in (None, "") else int(_number("seed", choices.seed, 2.0**63))
    chosen: dict[str, Any] = {
        "max_new_tokens": int(_number("max_new_tokens", choices.max_new_tokens, 2.0**31)) or None,
        "temperature": _number("temperature", choices.temperature),
        "top_p": _number("top_p", choices.top_p),
        "top_k": int(_number("top_k", choices.top_k, 2.0**31)),
        "repetition_penalty": _number("repetition_penalty", choices.repetition_penalty),
        "seed": seed,
    }
    Sampling(**chosen)  # its rules are checked before a conversation is changed
    return {name: value for name, value in chosen.items() if value is not None}


def _number(name: str, value: object, most: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        rule = f"a number from 0 to {most:g}" if most < math.inf else "a number, and not below 0"
        raise ConfigError(f"`{name}` is {str(value)[:40]}, but it must be {rule}.")
    return float(value)


def _read_tools(text: object) -> Sequence[Mapping[str, Any]]:
    if not isinstance(text, str) or not text.strip():
        return ()
    try:
        tools = parse_json(text.encode())
    except ValueError as error:
        raise DataError(f"The tools are no valid JSON ({error}).") from None
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError('The tools must be a list of objects: [{"name": ..., "parameters": {...}}, ...].')
    return tools
