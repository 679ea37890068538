"""Training rows that are read as they are learnt, for sets that do not fit on a disk.

`rows.py` (start here) gives them by number and tells places to go on from, `shuffle.py` draws them.
"""
