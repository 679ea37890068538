"""Rules that read an answer from free text: letters, numbers, the forms of BIG-Bench Hard.

Pure functions of text and question, with no model and no files. ``text.py`` is what all of them share; each
new pattern comes with a real completion in the tests.
"""
