"""The records that pass through an evaluation: sample, prompt, completion or failure, scores, text losses."""

from __future__ import annotations

from dataclasses import dataclass, field

from glmtune.messages import Message

LETTERS = "ABCD"
"""Of the exams with four options."""
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Letters of options, as far as a question has some."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One question of a benchmark, as its official file has it.

    Attributes:
        benchmark: a name such as ``ceval``.
        subject: the file it stands in, without split and suffix.
        index: its row in that file, from 0.
        question: the text, untouched.
        choices: the texts of the options in letter order; empty where there are none.
        answer: the gold answer (letter, number or target); empty where the split is unlabelled.
        row_id: the identifier the file itself gives (C-Eval's ``id`` column), else the index as text.
        explanation: the worked reasoning the file gives (dev rows), else empty.
        history: what was said before the question, oldest first; empty in all published benchmarks.
        rule: how the answer is read where every question says so itself (``exam``), else empty.
        cluster: what it shares with other questions beside the subject, such as the document that they are
            about; empty where nothing is named. Errors can be clustered by it.
    """

    benchmark: str
    subject: str
    index: int
    question: str
    choices: tuple[str, ...] = ()
    answer: str = ""
    row_id: str = ""
    explanation: str = ""
    history: tuple[Message, ...] = ()
    rule: str = ""
    cluster: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """What names the sample inside its benchmark: subject and index."""
        return (self.subject, self.index)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked: plain text for a base model, or the turns of a chat.

    Exactly one of ``text`` and ``turns`` is set. The backend adds the special tokens (``[gMASK] sop``) and,
    for turns, the model's chat template.

    Attributes:
        text: plain text that the model continues; None for a chat.
        turns: messages, the last one from the user; empty for plain text.
        num_fewshot: exemplars in it.
        seed: of the drawing, where tokens are drawn; no part of what is asked, so two prompts that differ in
            it alone are equal.
    """

    text: str | None = None
    turns: tuple[Message, ...] = ()
    num_fewshot: int = 0
    seed: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check that the prompt is text or turns."""
        assert (self.text is None) == bool(self.turns), "a prompt is text or turns, never both or neither"


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model generated.

    Attributes:
        text: generated text, without the prompt and without the stop string.
        stop_reason: ``eos``, ``stop`` (a stop string occurred) or ``length`` (cut: truncated).
        num_prompt_tokens: tokens of the prompt, special ones included.
        num_new_tokens: tokens generated.
    """

    text: str
    stop_reason: str
    num_prompt_tokens: int
    num_new_tokens: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a question has no answer, where the next one may have one.

    Attributes:
        reason: in words, on one line, fit for a terminal.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class ChoiceScores:
    """How probable each of a few next tokens is.

    Attributes:
        logprobs: natural log-probability of each choice over the whole vocabulary, in the order asked.
        num_prompt_tokens: tokens of the prompt, special ones included.
    """

    logprobs: tuple[float, ...]
    num_prompt_tokens: int

    @property
    def best(self) -> int:
        """The most probable choice; ties go to the earlier one."""
        return max(range(len(self.logprobs)), key=lambda place: (self.logprobs[place], -place))


@dataclass(frozen=True, slots=True)
class WindowLoss:
    """How badly a model predicts one window of a text.

    Attributes:
        num_tokens: tokens in it.
        nats: sum of their negative natural log-likelihoods.
    """

    num_tokens: int
    nats: float
