"""Layers of codes in a model: what they are, which layers become such, and how a loaded model is quantized.

Start with `linear.py`, the layer with its plain (reference) forward and backward. Then in the order in
which a quantization passes them: `plan.py` (which layers), `apply.py` (by the weights alone) or
`calibrate.py` (GPTQ, by the inputs of the layers; `finished_layers.py` keeps what is done in case the run
is killed), `report.py` (what was lost). `compiled.py` is what `torch.compile` sees of a layer. Fast
products are in `kernels`, quantizing while a checkpoint is read in `files`.
"""
