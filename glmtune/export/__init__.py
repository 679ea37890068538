"""Checkpoints for other tools: a base with its prefix or adapter, compared with its source before it appears.

``export.py`` is the whole way, in the order write aside → reload → compare → put in place. Weights stay on
disk: ``tensors.py`` reads, merges and renames one at a time, ``streamed.py`` runs a model on them,
``tokenizer.py`` translates the tokenizer. Saving a loaded model in the official format is
``save_pretrained``, in `glmtune.models.official`.
"""
