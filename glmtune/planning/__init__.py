"""What a run will need before it starts: memory by part, the cheapest setting that fits, time by trying.

In order: ``geometry.py`` (sizes of the model), ``hardware.py``, ``workload.py`` (what one process computes),
``states.py`` and ``activations.py`` (bytes), ``estimate.py`` (the largest moment), ``search.py``,
``check.py`` (all of it: start here). Weights are never read; only ``probe.py`` runs a model.
"""
