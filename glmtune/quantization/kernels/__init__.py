"""Fast products for layers of codes. None of them is needed: the plain path in `layers/linear.py` gives the same.

Start with `dispatch.py`: a table of which product runs when. The native one, for CPUs: `native.py` (compiling),
`packed.py` (the layout), `csrc/` (the loops), and on top of it `fused_projections.py`, `gated_mlp.py`,
`small_batch.py` and `for_training.py`. `int4pack.py` is PyTorch's product, `triton_kernels.py` are those for GPUs.
"""
