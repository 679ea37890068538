"""Encoded rows: made of conversations in batches, by several processes, and kept on disk.

`batches.py` encodes some conversations, `workers.py` has processes do so, `table.py` puts the rows into Arrow
tables, in memory or in a file. `cache.py` is the folder in which they stay, each set under a key that
`identity.py` makes of all that decides them. `mixture.py` joins several sets.
"""
