"""From the answers of one run to verdicts, averages, tables and the files of its folder.

The order: ``judging.py`` (right, wrong or not understood, answer by answer) → ``results.py`` (averages,
start here) → ``tables.py``, ``chart.py``, ``mistakes.py`` (for readers) → ``files.py`` (writes them all).
``summary.py`` is the table over several benchmarks, ``published.py`` what others reported. Two runs side by
side belong to ``compare``.
"""
