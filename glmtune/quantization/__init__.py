"""INT8 and INT4 weights: made, kept in layers, multiplied, and written to checkpoints.

The sub-packages, each importing only those above it::

    arithmetic   numbers <-> codes, as pure functions of tensors; the methods by name (`methods.py`)
    layers       layers of codes in a model: the layer, the plan, quantizing a loaded model, the report
    kernels      fast products for those layers          |  neither knows
    files        checkpoints in and out                  |  the other

`settings.py` stands beside them and needs only the names of the methods. How a checkpoint stores codes
(names, shapes, config.json) is in `glmtune.models.checkpoints.quantized_layout`: loading a quantized
release needs that much. Start with `arithmetic/primitives.py` for what a code is, with `layers/linear.py`
for what a model does with it.
"""
