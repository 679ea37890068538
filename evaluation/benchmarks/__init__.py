"""The benchmarks: how their data are found and read; prompts, rules and averages of their protocols.

Start in ``tasks.py`` (the table of benchmarks) and read ``mmlu.py``, the shortest of them; ``benchmark.py``
says what each must provide. ``sources.py`` finds data on this machine, ``fetch.py`` and ``hub.py`` download
them. Nothing here asks a model.
"""
