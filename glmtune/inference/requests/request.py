"""What is asked of the engine: the ids of a prompt, how to go on from it, and with which adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from glmtune.inference.requests.sampling import Sampling

FinishReason = Literal["eos", "stop", "length", "cancelled", "failed"]
"""Why a request ended: a token that ends answers, a stop text, its limit, its asker, an error."""


class TextStream(Protocol):
    """Turns the tokens of one answer into text; each piece is handed out once it cannot change any more.

    Attributes:
        is_stopped: whether a stop text occurred; what is handed out ends in front of it.
    """

    is_stopped: bool

    def feed(self, token_id: int) -> str:
        """Take the next token; return the text that became final, often none."""
        ...

    def finish(self) -> str:
        """Return the rest: no token follows."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to continue.

    Attributes:
        prompt_ids: all ids of the prompt, not empty.
        sampling: how tokens are chosen.
        stop_ids: tokens that end the answer; they are no part of it.
        adapter: name of a prefix or LoRA that the engine holds; empty: the base as it is.
        strength: of a prefix (its log is added to the scores of its columns), or scale of a LoRA: 1 as tuned,
            0 leaves it out.
        use_switch: obey the switch of the adapter, if it has one; False: it applies.
        text_stream: makes what turns the tokens into text; None: tokens only.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    adapter: str = ""
    strength: float = 1.0
    use_switch: bool = True
    text_stream: Callable[[], TextStream] | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was.

    Attributes:
        token_id: the token.
        logprob: natural log of its probability under the model, before temperature and penalties; None for
            the first token of a prompt, before which there is nothing.
        top: the likeliest tokens with theirs, the likeliest first.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step of the engine added to an answer.

    Attributes:
        text: that became final with it; with the last piece all the rest.
        token_ids: the new tokens, without one that ended the answer.
        logprobs: of these tokens, where asked for.
        finish_reason: why the answer ended, with its last piece; else None.
        error: what went wrong, where it failed.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str = ""
