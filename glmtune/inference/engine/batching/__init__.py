"""Which requests are read and which go on, step by step, in one batch.

Begin with ``continuous_batching.py``: it admits rows, reads their prompts and steps with those that run. A
``row.py`` is a request on its way; ``running_rows.py`` holds those that run, with their keys and values, and
``kept_caches.py`` what finished ones left for later; ``drafting.py`` lets rows take several tokens in a step.
Nothing here knows threads, names of adapters, or text.
"""
