"""Commands that run other commands one after the other, each in a process of its own.

Begin with ``quickstart.py``; what a single command does is a file of the folder above.
"""
