"""Fast products for layers of codes, none of which is needed: without them `layers/linear.py` multiplies.

Start with `dispatch.py`: a table of which product runs when. The native one, for CPUs: `native.py`
(compiling), `library_cache.py` (what may be loaded), `packed.py` (the layout), `csrc/` (the loops), and on
top of it `fused_projections.py`, `gated_mlp.py`, `small_batch.py` and `for_training.py`. `int4pack.py` is
PyTorch's product, `triton_kernels.py` are those for GPUs.
"""
