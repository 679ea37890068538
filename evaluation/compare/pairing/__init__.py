"""Finished runs read back from their folders (``runs.py``), and matched question by question (``match.py``).

Two runs are paired only if they asked the same questions in the same way and read them by the same rule;
every difference that forbids it is named.
"""
