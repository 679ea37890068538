"""Rules that read an answer from free text: letters, numbers, formulas, overlap with a reference.

Pure functions of text and question, with no model and no files. ``text.py`` is what all of them share, and
``letters.py`` is a good one to begin with; ``equality.py`` alone asks a process of its own. Each new pattern
comes with a real completion in the tests.
"""
