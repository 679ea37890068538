"""Scores of generated text against references (ROUGE, BLEU, exact match), and how sure they are.

``text.py`` scores a row, ``summary.py`` a file with bootstrap intervals, ``significance.py`` two files
against each other. Accuracy on benchmarks is not here but in the package ``evaluation``.
"""
