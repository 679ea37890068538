"""Thoughts in front of an answer: ``<think>thoughts</think>answer``, as GLM-Z1 and later models write them.

A prompt of such a model may end with ``<think>`` already; then the model writes the thoughts, the closing tag
and the answer. Whoever reads what it wrote puts the tag in front again, so that a text tells by itself what
of it is thought. Nothing but a tag at its very beginning opens thoughts: an answer may speak of the tags.
"""

from __future__ import annotations

from glmtune.errors import DataError

OPEN, CLOSE = "<think>", "</think>"


def split_thoughts(text: str) -> tuple[str, str]:
    """Part what a model wrote into thoughts and answer.

    Args:
        text: with the opening tag, also where that stands in the prompt.

    Returns:
        Thoughts, without tags, and the answer, both stripped. Thoughts that are never closed have no answer.

    >>> split_thoughts("<think>2 and 2</think>4"), split_thoughts("4"), split_thoughts("<think>cut off")
    (('2 and 2', '4'), ('', '4'), ('cut off', ''))
    >>> split_thoughts("Close with </think>.")
    ('', 'Close with </think>.')
    """
    if not has_thoughts(text):
        return "", text.strip()
    thoughts, _, answer = text.lstrip().removeprefix(OPEN).partition(CLOSE)
    return thoughts.strip(), answer.strip()


def join_thoughts(thoughts: str, answer: str) -> str:
    r"""Return an answer with thoughts in front, as the models write them.

    >>> join_thoughts("2 and 2", "4"), join_thoughts("", "4")
    ('<think>\n2 and 2\n</think>\n4', '4')
    """
    return f"{OPEN}\n{thoughts.strip()}\n{CLOSE}\n{answer}" if thoughts.strip() else answer


def thoughts_and_rest(answer: str) -> tuple[str, str] | None:
    """Part an answer of a training row at its tags; None where it has no thoughts.

    Returns:
        What stands between the tags, and what stands behind, both as they are.

    Raises:
        DataError: the thoughts have no end.

    >>> thoughts_and_rest("<think> 2 and 2 </think> 4"), thoughts_and_rest("4")
    ((' 2 and 2 ', ' 4'), None)
    """
    if not has_thoughts(answer):
        return None
    thoughts, close, rest = answer.lstrip().removeprefix(OPEN).partition(CLOSE)
    if not close:
        raise DataError(
            f"The answer {answer[:40]!r} opens thoughts with `{OPEN}` and never closes them. Add `{CLOSE}` "
            "and the answer behind it, or take the tag away."
        )
    return thoughts, rest


def has_thoughts(text: str) -> bool:
    """Say whether a text begins with the tag of thoughts, be they empty or never closed."""
    return text.lstrip().startswith(OPEN)


def opens_thoughts(prompt: str) -> bool:
    """Say whether a prompt ends inside thoughts, which the model then goes on with."""
    return prompt.rstrip().endswith(OPEN)
