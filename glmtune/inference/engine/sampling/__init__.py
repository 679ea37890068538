"""Choosing the next tokens of a batch, each row by its own settings and with its own random numbers.

Start with ``choose.py`` (`TokenChooser`, which the engine asks after every step); ``distribution.py`` draws
from the tokens that top-k, top-p and min-p leave, ``logit_changes.py`` has penalties and biases,
``logprobs.py`` what is reported about tokens. ``lookup.py`` drafts tokens from what was there before,
to be checked at once.
"""
