"""Many runs over the values of settings: which are trained, what came out, which is likely to be the best.

Begin with ``running.py``, which trains one trial after the other, each in a process of its own. ``space.py``
says what points are, ``trials.py`` keeps what became of them, ``search.py`` lets Optuna choose them;
``statistics.py`` tells the best from the lucky, ``report.py`` and ``picture.py`` show it. Words of the
command line become points in ``recipes/flows/sweep.py``; nothing here knows Hydra, or loads a model.
"""
