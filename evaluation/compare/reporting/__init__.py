"""A comparison for readers: tables, charts, the page of flips, the ranking of several candidates.

Start in ``report.py``, which puts ``compare.md`` and ``compare.json`` together; ``methods.py`` is the table
of several ways to quantize. Intervals and tests come from ``statistics``.
"""
