"""Which model a user means: names of releases, their families, and the folder on this machine.

A reader starts in ``source.py``, which turns a name into a folder with the help of ``presets.py`` and
``hub.py``; ``families.py`` tells the release lines apart, whose files all call themselves ``chatglm``. No
weights and no tensors here.
"""
