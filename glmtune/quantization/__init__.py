"""INT8 and INT4 weights: arithmetic, packing, layers, and the walk over a model."""
