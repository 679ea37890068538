"""Thoughts in front of an answer: ``<think>thoughts</think>answer``, as GLM-Z1 and later models write them.

A prompt of such a model may end with ``<think>`` already; then the model writes the thoughts, the closing tag
and the answer.
"""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def split_thoughts(text: str) -> tuple[str, str]:
    """Part what a model wrote into thoughts and answer.

    Args:
        text: from the prompt's end on, with or without the opening tag.

    Returns:
        Thoughts, without tags, and the answer, both stripped. A text without a closing tag is an answer,
        unless it opens thoughts and never closes them.

    >>> split_thoughts("<think>2 and 2</think>4"), split_thoughts("4"), split_thoughts("<think>cut off")
    (('2 and 2', '4'), ('', '4'), ('cut off', ''))
    """
    thoughts, close, answer = text.partition(CLOSE)
    if close:
        return thoughts.strip().removeprefix(OPEN).strip(), answer.strip()
    if text.lstrip().startswith(OPEN):
        return text.strip().removeprefix(OPEN).strip(), ""
    return "", text.strip()


def opens_thoughts(prompt: str) -> bool:
    """Say whether a prompt ends inside thoughts, which the model then goes on with."""
    return prompt.rstrip().endswith(OPEN)
