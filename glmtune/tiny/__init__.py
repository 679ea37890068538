"""The embedded model glm-tiny: how it was made, and how it can be made again.

``corpus/`` writes what it learns from, ``tokenizer.py`` and ``start.py`` what training starts with,
``induction.py`` its first weights, ``package.py`` the files that ship; ``exam.py`` tests it. Nothing else in
glmtune needs this package, except recipes that train glm-tiny.
"""
