"""The benchmarks: how their data are found and read; prompts, rules and averages of their protocols.

Start in ``tasks.py`` (the table of benchmarks) and read ``mmlu.py``, the shortest of them; ``benchmark.py``
says what each must provide. Those beyond the four of the model card are in ``further``, a user's own in
``own``. ``sources.py`` finds data on this machine, ``fetch.py`` and ``hub.py`` download them. Nothing here
asks a model.
"""
