"""The result of a run that answered every question several times: mean, majority vote, pass@k.

``result.py`` (start here) puts the results of the single answers together, question by question;
``files.py`` writes them as tables, JSON and a figure, in the form of any other evaluation, so that what reads
evaluations reads these as well.
"""
