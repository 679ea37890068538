"""The exercises that glm-tiny learns from, written by rules and word lists of ours; no text of others.

Start with ``mix.py``: which exercises there are and how often each is drawn. A module per skill makes them,
from ``lexicon/*.yaml``; the same seed gives the same rows.
"""
