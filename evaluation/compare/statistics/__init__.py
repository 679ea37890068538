"""The mathematics of a comparison, on counts and outcomes alone: no files, no tables.

Start in ``drops.py``; ``counts.py`` is what it counts, ``intervals.py`` the tests and intervals, ``gate.py``
the verdict; ``graded.py`` does all of it where answers have grades from 0 to 1. ``sensitivity.py`` and
``perplexity.py`` measure what moves before an accuracy does.
"""
