"""Floating point numbers to codes and back, as functions of tensors; no model, no file is known here.

Start with `primitives.py` (scales, rounding, clip search), then `packing.py` (codes to bytes). `gptq.py`
and `hqq.py` are other ways to choose codes, `methods.py` names all of them, and `chunking.py` does a large
weight piece by piece.
"""
