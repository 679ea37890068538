"""Benchmarks by their published protocols, and what one model loses against another on paired questions.

One evaluation passes these files: ``benchmarks/tasks.py`` (questions and protocol become a ``task.Task``) →
``evaluate.py`` (start here) → ``running/runner.py`` (asks, keeps each answer in a journal) → ``backends/``
(computes) → ``extraction/`` (reads the answer) → ``reporting/results.py`` (judges and averages) →
``reporting/files.py`` (writes). A comparison of two finished runs starts in ``compare/build.py``. Command
lines and Hydra stay in ``recipes``.
"""
