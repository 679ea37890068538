"""Checkpoints in and out: quantized while they are read, or written as a quantized copy.

Start with `quantize_on_load.py`, what ``quantization=NAME`` does in every command; `write.py` is ``glmtune
quantize``, which adds the writing, the checks and the resuming. `external.py` loads by other libraries.
What is done to a model in memory is in `layers`.
"""
