"""What an evaluation needs of a model: lengths, completions, and the probabilities of a few next tokens.

Iterators in any order, not lists: an answer is kept as soon as it is there, and an engine need not wait for
the longest of a batch before it gives out the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from evaluation.sample import ChoiceScores, Completion, Failure, Prompt


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model answered; part of a result's fingerprint.

    Attributes:
        name: preset, hub id or folder as the user gave it.
        weights_hash: hash that tells two sets of weights apart (``""`` where a server does not say).
        family: release, such as ``chatglm2``; ``""`` if unknown.
        dtype: such as ``bfloat16``; ``""`` if unknown.
        quantization: method, or ``none``.
        adapter: hash of the prefix or LoRA in use, or ``none``.
        is_chat: whether prompts are conversations (chat models) or plain text (base models).
        engine: what computed: ``glmtune``, ``openai`` or ``vllm``.
        config_hash: hash of what beside the weights decides the numbers: architecture, scaling of an adapter,
            vocabulary; ``""`` if unknown.
        server: where the model was asked and what is told of it there; empty for models of this machine.
        tuned: what is attached to the model, as the user named it, such as ``prefix runs/ptuning``; for
            readers, as ``adapter`` decides.
    """

    name: str
    weights_hash: str
    family: str
    dtype: str
    quantization: str
    adapter: str
    is_chat: bool
    engine: str
    config_hash: str = ""
    server: Mapping[str, Any] = field(default_factory=dict)
    tuned: str = ""


SEED_BITS = 31
"""Of a seed: more than some servers take as a whole number."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """How tokens are drawn, where a question is answered more than once.

    Attributes:
        temperature: divides the logits; above 0.
        top_p: keep the likeliest tokens up to this sum of probabilities; 1 keeps all.
        top_k: keep at most so many tokens; 0 keeps all.
        seed: of the whole run.
        number: which answer to each question this is, from 0.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    number: int = 0

    def seed_of(self, subject: str, index: int) -> int:
        """Return the seed of one answer, which depends on its question and number and on nothing else.

        So an answer is the same whichever others are asked beside it, before or after a kill, and by how
        many processes.

        >>> first, second = Drawing(0.8), Drawing(0.8, number=1)
        >>> first.seed_of("law", 3) == Drawing(0.8).seed_of("law", 3) != second.seed_of("law", 3)
        True

        Args:
            subject: of the question.
            index: its row in the official file.
        """
        text = f"{self.seed}\n{self.number}\n{subject}\n{index}"
        digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()
        return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


@dataclass(frozen=True, slots=True)
class Limits:
    """How to generate, and how far.

    Attributes:
        max_new_tokens: tokens after which a completion counts as truncated.
        stop: strings that end a completion; they are cut off.
        drawing: how tokens are drawn, each prompt by its own ``seed``; None takes the likeliest ones.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    drawing: Drawing | None = None


class Backend(Protocol):
    """A model behind an evaluation.

    Results come as they finish, in any order, each with the place of its prompt in the sequence given.
    Prompts that begin alike (few-shot exemplars) should be passed together: a backend may read the common
    part once.
    """

    @property
    def identity(self) -> ModelIdentity:
        """Which model this is."""
        ...

    @property
    def max_context_tokens(self) -> int:
        """Prompt and completion together may be so long."""
        ...

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the length of a prompt in tokens, special ones and template included."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], limits: Limits
    ) -> Iterator[tuple[int, Completion | Failure]]:
        """Complete prompts: greedily, or drawn as the limits say.

        Yields:
            Place of the prompt and its completion, as they finish; a failure where there is none and others
            may still have one.

        Raises:
            GlmtuneError: a prompt with its completion does not fit the model's context, or memory does not
                suffice.
        """
        ...

    def score_choices(
        self, prompts: Sequence[Prompt], choices: Sequence[str]
    ) -> Iterator[tuple[int, ChoiceScores | Failure]]:
        """Return how probable each choice is as the next token.

        The token of a choice is found by tokenising the whole prompt followed by the choice and taking the id
        that comes after the prompt's own ids.

        Args:
            prompts: the questions.
            choices: strings as they follow the prompt, such as ``A`` or `` A``; the same for every prompt.

        Yields:
            Place of the prompt and its scores or failure, as they finish.

        Raises:
            GlmtuneError: a choice is no single token after a prompt, or a prompt does not fit.
        """
        ...
