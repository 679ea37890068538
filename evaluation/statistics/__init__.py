"""Estimates that a paper can quote, on plain numbers: no files, no tables, nothing of a benchmark.

``sampled.py`` (start here) is about several answers to one question: their mean, their vote, pass@k.
``clustered.py`` puts errors around an average whose questions hang together. ``adjusted.py`` corrects several
tests, ``paired.py`` compares two runs by the questions' scores; ``without_spread.py`` is for both where all
scores are equal. Two runs of zeros and ones, and verdicts on them, belong to
``evaluation/compare/statistics``.
"""
