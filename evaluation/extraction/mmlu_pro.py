"""The rule by which MMLU-Pro's repository reads a letter from a completion.

Source: ``extract_answer`` and what it falls back on in ``evaluate_from_local.py`` of TIGER-AI-Lab/MMLU-Pro.
Where nothing is found the repository draws a letter; here that counts as not understood.
"""

from __future__ import annotations

import re

from evaluation.sample import Sample

_STATED = re.compile(r"answer is \(?([A-J])\)?")
_LABELLED = re.compile(r"[aA]nswer:\s*([A-J])")
_ALONE = re.compile(r"\b[A-J]\b")


def strict(text: str, sample: Sample) -> str | None:
    """Extract the letter of the first ``answer is (X)``, the form that is asked for."""
    del sample
    found = _STATED.search(text)
    return found[1] if found else None


def official(text: str, sample: Sample) -> str | None:
    """Extract as the repository does: ``answer is (X)``, else ``Answer: X``, else the last letter by itself.

    >>> ten = Sample("mmlu_pro", "law", 0, "?", choices=tuple("0123456789"))
    >>> [official(text, ten) for text in ("So the answer is (G).", "Answer: C", "It is B or D", "no idea")]
    ['G', 'C', 'D', None]
    """
    if letter := strict(text, sample):
        return letter
    # `.*[aA]nswer:` takes the last one of the first line that has any; found so, as the expression itself
    # would try every place of a long text without one anew.
    labelled = list(_LABELLED.finditer(text))
    if labelled:
        line_end = text.find("\n", labelled[0].start())
        return [each for each in labelled if line_end < 0 or each.start() < line_end][-1][1]
    alone = _ALONE.findall(text)
    return alone[-1] if alone else None
