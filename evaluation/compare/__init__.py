"""What a candidate loses against a baseline on the same questions, and whether that is tolerable.

The order: ``pairing`` (reads two runs and matches their questions) → ``statistics`` (counts, intervals,
verdict) → ``reporting`` (tables, charts, files). Start in ``build.py``, which calls the three. Works on the
files of finished runs; asking models is ``evaluate.py``'s work, and ``recipes/compare.py`` puts the two
together.
"""
