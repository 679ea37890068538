"""A comparison for readers: tables, charts, the page of flips, the ranking of several candidates, and their
files.

Start in ``report.py``, which puts ``compare.md`` and ``compare.json`` together; ``methods.py`` is the table
of several ways to quantize. No figure is computed here that ``statistics`` could not be asked for.
"""
