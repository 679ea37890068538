"""Put worked examples before a question: as plain text, as one user turn, or as alternating turns.

Which of these a benchmark uses is part of its protocol and moves scores by points; see
``evaluation.benchmarks``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evaluation.sample import Prompt, Sample
from glmtune.messages import Message


@dataclass(frozen=True, slots=True)
class Exemplar:
    """One worked example.

    Attributes:
        question: up to and including the cue for the answer (``Answer:``).
        answer: what follows the cue, leading blank or newline included.
    """

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class FewShot:
    """The exemplars of a protocol, and how they ask.

    Attributes:
        exemplars: by subject, the first ones kept longest.
        ask: sample to its question as an exemplar asks it.
    """

    exemplars: Mapping[str, Sequence[Exemplar]]
    ask: Callable[[Sample], str]

    def shows_own(self, sample: Sample, num_fewshot: int) -> bool:
        """Say whether a question stands, with its answer, among its own exemplars.

        Args:
            sample: the question.
            num_fewshot: exemplars in its prompt, counted from the first.
        """
        asked = _bare(self.ask(sample))
        return any(_bare(shot.question) == asked for shot in self.exemplars[sample.subject][:num_fewshot])


def _bare(text: str) -> str:
    """Return a text by which copies of one question are known: blanks, case and width do not matter."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def as_text(header: str, exemplars: Sequence[Exemplar], question: str) -> str:
    r"""Return header, worked examples and question as one text.

    Args:
        header: text before everything, its own separator included.
        exemplars: worked examples.
        question: the question with its cue; the model continues here.

    >>> as_text("About birds.\n\n", [Exemplar("1+1?\nAnswer:", " 2")], "1+2?\nAnswer:")
    'About birds.\n\n1+1?\nAnswer: 2\n\n1+2?\nAnswer:'
    """
    shots = "".join(f"{shot.question}{shot.answer}\n\n" for shot in exemplars)
    return header + shots + question


def text_prompt(text: str, *, num_fewshot: int, is_chat: bool) -> Prompt:
    """Wrap a text: as it is for a base model, as the only user turn for a chat model."""
    if is_chat:
        return Prompt(turns=(Message("user", text),), num_fewshot=num_fewshot)
    return Prompt(text=text, num_fewshot=num_fewshot)


def turns_prompt(header: str, exemplars: Sequence[Exemplar], question: str) -> Prompt:
    """Return a chat in which every worked example is a question and its answer.

    The header stands at the beginning of the first user turn, since GLMs before ChatGLM3 know no system role.

    Args:
        header: text before everything, its own separator included.
        exemplars: worked examples; outer white space of their answers is left out.
        question: the last user turn.
    """
    turns: list[Message] = []
    for shot in exemplars:
        turns += [Message("user", shot.question), Message("assistant", shot.answer.strip())]
    turns.append(Message("user", question))
    turns[0] = Message("user", header + turns[0].content)
    return Prompt(turns=tuple(turns), num_fewshot=len(exemplars))
