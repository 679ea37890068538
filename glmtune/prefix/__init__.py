"""P-Tuning v2: trainable keys and values in front of every layer of a frozen base.

In the order in which a run passes them: ``settings.py``, ``init.py`` (a new prefix), ``encoder.py`` (the
module that is trained), ``attach.py`` and ``attention.py`` (its way into the model), ``checkpoint.py`` (its
files). Training itself is in `glmtune.training`; a prefix that several *prompts* share is something else,
see `glmtune.inference`.
"""
