"""Commands that run other commands, each in a process of its own; they stand above the recipes that they run.

Begin with ``quickstart.py``, three commands one after the other; ``sweep.py`` trains once for every point of
several settings' values. What a single command does is a file of the folder above.
"""
