"""What one user talks about and how: the conversation, the sampling, what is put on the base, the tools."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmtune.errors import ConfigError, DataError, unknown_name
from glmtune.inference.requests.sampling import Sampling
from glmtune.interactive.answerer import Answerer, AnswerStream
from glmtune.interactive.conversation import Conversation
from glmtune.storage.json_files import MAX_JSON_BYTES, parse_json

SAMPLING: Mapping[str, type] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "max_new_tokens": int,
    "repetition_penalty": float,
    "seed": int,
}
"""The fields of `Sampling` that can be chosen, and what their values are."""
STRENGTHS: Mapping[str, str] = {"prefix": "prefix_strength", "lora": "adapter_scale"}
"""What has a strength, and the setting of it."""
MAX_STRENGTH = 10.0


@dataclass(slots=True)
class Session:
    """One talk.

    Attributes:
        answerer: who answers.
        conversation: what was said.
        sampling: fields of `Sampling` that the user chose; the rest is the answerer's.
        adapter: name of the prefix or LoRA; empty: the base.
        strengths: of prefixes and of LoRAs, by kind; kept while something else is chosen.
        tools: descriptions of the tools that the model may call.
    """

    answerer: Answerer
    conversation: Conversation = field(default_factory=Conversation)
    sampling: dict[str, Any] = field(default_factory=dict)
    adapter: str = ""
    strengths: dict[str, float] = field(default_factory=dict[str, float])
    tools: Sequence[Mapping[str, Any]] = ()

    def ask(self) -> AnswerStream:
        """Ask for an answer to the conversation as it stands.

        Raises:
            GlmtuneError: it cannot be asked so.
        """
        return self.answerer.answer(
            self.conversation.messages,
            sampling=self.sampling,
            adapter=self.adapter,
            strength=self.strength,
            tools=self.tools,
        )

    def choose_sampling(self, name: str, value: Any) -> None:
        """Choose one field of the sampling; None leaves it to the answerer.

        Raises:
            ConfigError: it is out of range.
        """
        if value is None:
            self.sampling.pop(name, None)
            return
        Sampling(**{name: value})  # checks it
        self.sampling[name] = value

    def choose_adapter(self, name: str) -> None:
        """Choose a prefix or LoRA; empty: the base.

        Raises:
            ConfigError: there is none of that name.
        """
        names = [choice.name for choice in self.answerer.adapters]
        if name and name not in names:
            if not names:
                raise ConfigError(
                    f"There is no adapter `{name}`: none was loaded. Start with `prefix_path=RUN` or"
                    " `adapter_path=RUN`."
                )
            raise ConfigError(unknown_name("The adapter", name, names))
        self.adapter = name

    @property
    def strength(self) -> float:
        """Of what is chosen; 1 for the base."""
        return self.strengths.get(self._kind(), 1.0)

    def choose_strength(self, strength: float) -> None:
        """Choose how much the chosen prefix or LoRA counts: 1 as tuned, 0 the base.

        Raises:
            ConfigError: it is out of range, or nothing is chosen that could have one.
        """
        _check_strength(strength)
        if self._kind() not in STRENGTHS:
            what = (
                f"the server does not say that `{self.adapter}` is one" if self.adapter else "none is chosen"
            )
            raise ConfigError(
                f"A strength is that of a prefix or LoRA, and {what}. Choose one: /adapter NAME."
            )
        self.set_strength(self._kind(), strength)

    def set_strength(self, kind: str, strength: float) -> None:
        """Set how much all prefixes count, or all LoRAs, whichever is chosen now.

        Args:
            kind: ``prefix`` or ``lora``.
            strength: 1 as tuned, 0 the base.

        Raises:
            ConfigError: it is out of range, or there is none of the kind.
        """
        _check_strength(strength)
        if kind not in {choice.kind for choice in self.answerer.adapters}:
            raise ConfigError(
                f"`{STRENGTHS[kind]}` is {strength:g}, but no {kind} was loaded. Name one, or leave it out."
            )
        self.strengths[kind] = strength

    def _kind(self) -> str:
        """Return what is chosen: ``prefix``, ``lora``, ``unknown`` where a server does not say, nothing."""
        if not self.adapter:
            return ""
        kinds = {choice.name: choice.kind for choice in self.answerer.adapters}
        return kinds[self.adapter] or "unknown"

    def offer_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Let the model call tools from the next question on.

        Raises:
            ConfigError: the model knows no tools.
        """
        if tools and not self.answerer.knows_tools:
            raise ConfigError(
                f"{self.answerer.model_name} knows no tools: ChatGLM3 and GLM-4 do. Choose one of these with"
                " `model=`, or leave the tools out."
            )
        self.tools = tuple(tools)


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= MAX_STRENGTH or math.isnan(strength):
        raise ConfigError(
            f"The strength is {strength}, but it must be from 0 (the base) to {MAX_STRENGTH:g}; 1 is as"
            " tuned."
        )


def read_tools_file(path: str | Path) -> list[Mapping[str, Any]]:
    """Read descriptions of tools: a JSON list, in OpenAI's form or bare.

    Raises:
        ConfigError: the file cannot be read.
        DataError: it holds something else.
    """
    file = Path(path).expanduser()
    try:
        content = file.read_bytes()[: MAX_JSON_BYTES + 1]
        found: Any = parse_json(content)
    except OSError as error:
        raise ConfigError(
            f"`{file}` cannot be read ({error.strerror or error}). Give a JSON file of tool descriptions."
        ) from None
    except ValueError as error:
        raise DataError(f"It is no valid JSON ({error}).", path=file) from None
    tools: Any = [found] if isinstance(found, dict) else found
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("It must hold a list of tool descriptions, objects with a `name`.", path=file)
    for number, tool in enumerate(tools, start=1):
        if not tool_name(tool):
            shown = json.dumps(tool, ensure_ascii=False)[:60]
            raise DataError(f"Tool {number} has no `name`: {shown}. Give it one.", path=file)
    return tools


def tool_name(tool: Mapping[str, Any]) -> str:
    """Return the name of a tool, in OpenAI's form or bare; empty where it has none."""
    inner = tool.get("function")
    name = (inner if isinstance(inner, Mapping) else tool).get("name")
    return name if isinstance(name, str) else ""
