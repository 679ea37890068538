"""From the words of a command line to Hydra's overrides.

Start with `reading`: it takes the words one by one. `aliases` is the table of names that other tools have for
our settings, `values` writes what was typed as Hydra's grammar reads it, and `command` says what a command is
and which settings and groups it has.
"""
