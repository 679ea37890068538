"""What an engine says of itself: the adapters it holds, what it does, and why it refuses a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from glmtune.errors import ConfigError, GlmtuneError

if TYPE_CHECKING:
    from glmtune.switch.rule import SwitchFacts

AdapterKind = Literal["prefix", "lora"]


class EngineBusyError(GlmtuneError):
    """The queue of waiting requests is full; asking again later may do."""


class EngineClosedError(GlmtuneError):
    """The engine takes no more requests: it drains or was stopped."""


class NoSuchAdapterError(ConfigError):
    """The engine holds no prefix or LoRA of that name."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A prefix or LoRA that an engine holds.

    Attributes:
        name: how requests name it.
        kind: what it is.
        path: where it was read.
        content_hash: of its weights.
        num_tokens: length of a prefix; 0 for a LoRA.
        switch: how well its switch does; None: it has none, or was told to ignore it.
    """

    name: str
    kind: AdapterKind
    path: str
    content_hash: str
    num_tokens: int = 0
    switch: SwitchFacts | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine does now, and did since its start.

    Attributes:
        num_running: requests whose prompt is read or being read.
        num_waiting: requests in the queue.
        cache_tokens: tokens whose keys and values are held for running requests.
        kept_tokens: tokens of finished requests, held to be used again.
        cache_budget: most tokens that there is ever memory for, running and kept together.
        prompt_tokens: tokens of prompts taken since the start.
        cached_prompt_tokens: how many of these were not read.
        new_tokens: tokens generated since the start.
        allocated_tokens: tokens that there is memory for now, room for those to come included.
        token_bytes: that keys and values of one token take.
        num_draft_tokens: tokens drafted and computed since the start.
        num_accepted_tokens: how many of these were what the model chose anyway.
        switched: by adapter, what its switch decided since the start: how often on, how often off.
    """

    num_running: int
    num_waiting: int
    cache_tokens: int
    kept_tokens: int
    cache_budget: int
    prompt_tokens: int
    cached_prompt_tokens: int
    new_tokens: int
    allocated_tokens: int = 0
    token_bytes: float = 0.0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    switched: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
