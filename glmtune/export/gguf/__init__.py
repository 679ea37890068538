"""Checkpoints as one GGUF file, which llama.cpp, Ollama and programs built on them read.

``folder.py`` is the way: hyperparameters (``hyperparameters.py``), vocabulary (``vocabulary.py``) and tensors
(``layout.py``: names and shapes; ``types.py``: which type each has; ``encoding.py`` and ``k_quants.py``:
numbers to blocks) go into the file one tensor at a time, and a Modelfile for Ollama (``modelfile.py``) beside
it. ``reading.py`` reads a file back, so that it can be held against its source before it appears.

The layouts are llama.cpp's; the code is ours. Only the `gguf` package is needed, no build of llama.cpp.
"""
