"""What a strength costs and gives: task score and retention of something tuned, at several strengths.

Begin with ``measure.py``, which puts one strength after the other into a loaded model and measures it;
``points.py`` keeps what was measured, ``report.py`` shows it.
"""
