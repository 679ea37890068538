"""Prompts that fit a model's context: exemplars are lost, then the middle of a text, then room to generate.

The question itself is never cut.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from dataclasses import dataclass

from evaluation.backend import Backend, Limits
from evaluation.sample import Prompt, Sample
from evaluation.task import CHOICES, Task

SPARE_TOKENS = 64
"""More than any template and special tokens add to the bytes of a prompt."""
ROOM_STEP = 32
"""Shortened generations are rounded down to multiples, so that few different limits occur."""
SLACK_TOKENS = 8
"""Of a context that a shortened text may leave unused: each look at one more cut encodes all of it."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as a model with a limited context is asked it.

    Attributes:
        sample: the question.
        prompt: with as many exemplars as fit; None where not even the bare question does.
        max_new_tokens: room to generate; less than the protocol's only where the question itself is long.
    """

    sample: Sample
    prompt: Prompt | None
    max_new_tokens: int


def fit_prompt(task: Task, sample: Sample, backend: Backend) -> Asked:
    """Write the prompt of a question with as many exemplars as fit beside the room to generate.

    Args:
        task: the protocol.
        sample: the question.
        backend: counts tokens and knows the context's length.
    """
    # Choices are read from the scores of one next token.
    needed = 1 if task.kind == CHOICES else task.max_new_tokens(sample)
    prompt = task.prompt(sample)
    for num_fewshot in range(prompt.num_fewshot, -1, -1):
        prompt = task.prompt(sample, num_fewshot)
        if fits(prompt, needed, backend):
            return Asked(sample, prompt, needed)
    if (shortened := _shortened(task, sample, needed, backend)) is not None:
        return Asked(sample, shortened, needed)
    room = backend.max_context_tokens - backend.count_tokens(prompt)
    if room >= ROOM_STEP:
        room -= room % ROOM_STEP
    return Asked(sample, prompt if room > 0 else None, min(room, needed))


def _shortened(task: Task, sample: Sample, needed: int, backend: Backend) -> Prompt | None:
    """Return the prompt with as much of its text as fits; None without a text, or with too little room."""
    shorten, longest = task.prepared.shorten, task.prepared.longest
    if shorten is None or longest is None:
        return None
    limit = backend.max_context_tokens - needed
    kept, too_many = 0, longest(sample)
    fewest, most = (backend.count_tokens(shorten(sample, count)) for count in (kept, too_many))
    if fewest > limit:
        return None
    halve = False
    while too_many - kept > 1 and limit - fewest > SLACK_TOKENS:
        # Tokens grow about evenly with characters, so that a guess is near; every other step halves what is
        # left, as guesses alone may creep.
        share = 0.5 if halve else (limit - fewest) / max(1, most - fewest)
        guess = min(max(kept + 1, kept + int((too_many - kept) * share)), too_many - 1)
        count, halve = backend.count_tokens(shorten(sample, guess)), not halve
        if count <= limit:
            kept, fewest = guess, count
        else:
            too_many, most = guess, count
    return shorten(sample, kept)


def fit_extraction(task: Task, sample: Sample, completion: str, backend: Backend) -> Prompt | None:
    """Write the second prompt of a two-stage protocol; a completion too long for it is cut at its end.

    Args:
        task: the protocol.
        sample: the question.
        completion: what the first stage gave.
        backend: counts tokens and knows the context's length.

    Returns:
        The prompt, or None where it does not fit even without the completion.
    """
    prompt = task.extraction_prompt(sample, completion)
    if fits(prompt, 1, backend):
        return prompt
    if not fits(task.extraction_prompt(sample, ""), 1, backend):
        return None

    def cut(length: int) -> Prompt:
        return task.extraction_prompt(sample, completion[:length])

    # Longest first, so that the key goes from False to True.
    longest = len(completion)
    too_long = bisect_left(range(longest, 0, -1), True, key=lambda length: fits(cut(length), 1, backend))
    return cut(longest - too_long)


def fits(prompt: Prompt, room: int, backend: Backend) -> bool:
    """Say whether a prompt leaves room in the context.

    A token stands for at least one byte, so that most prompts need not be counted.

    Args:
        prompt: the prompt.
        room: tokens to come after it.
        backend: counts tokens and knows the context's length.
    """
    limit = backend.max_context_tokens - room
    texts = [prompt.text or "", *(turn.content for turn in prompt.turns)]
    at_most = sum(len(text.encode("utf-8", "backslashreplace")) for text in texts)
    if at_most + SPARE_TOKENS * (1 + len(prompt.turns)) <= limit:
        return True
    return backend.count_tokens(prompt) <= limit


def limits_of(task: Task, asked: Asked) -> Limits:
    """Return how far to generate for a question.

    Args:
        task: the protocol.
        asked: the question.
    """
    return dataclasses.replace(task.limits, max_new_tokens=asked.max_new_tokens)
