"""Questions found inside prompts: for runs of tools that keep whole prompts and not the questions in them."""

from __future__ import annotations

from collections.abc import Sequence

ANCHOR_CHARS = 24
"""Of a question's beginning, looked up at every place of a prompt; then the whole question is compared."""


def find_in_prompts(questions: Sequence[str], prompts: Sequence[str]) -> list[int | None]:
    """Find the prompt that each question is in.

    A prompt may hold several questions (a short one inside a long one, worked examples): the longest counts.
    Of questions with the same text, the first gets the first prompt that holds it, and so on.

    Args:
        questions: without differences of blanks.
        prompts: likewise.

    Returns:
        Place of the prompt for each question; None where none is left that holds it.

    >>> find_in_prompts(["1 + 1?", "What is 1 + 1?", "2?"], ["Q: What is 1 + 1? A:", "Q: 1 + 1? A:"])
    [1, 0, None]
    """
    # One look-up per place of a prompt, not one search per question and prompt: 14,000 of each are seconds.
    by_anchor: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        by_anchor.setdefault(question[:ANCHOR_CHARS], []).append(place)
    lengths = sorted({len(anchor) for anchor in by_anchor if anchor}, reverse=True)
    waiting: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        waiting.setdefault(question, []).append(place)
    found: list[int | None] = [None] * len(questions)
    for number, prompt in enumerate(prompts):
        held = {
            questions[place]
            for length in lengths
            for start in range(len(prompt) - length + 1)
            for place in by_anchor.get(prompt[start : start + length], ())
            if prompt.startswith(questions[place], start)
        }
        if held and (left := waiting[max(held, key=len)]):
            found[left.pop(0)] = number
    return found
