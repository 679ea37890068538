"""The tokenizer of each release as a transformers tokenizer, without code from a checkpoint.

Start with ``load.py``, the table of releases; then ``base.py`` and ``vocabulary.py`` (what all share), and
the one file of the generation in question. Prompts are not made here: see `glmtune.models.templates`.
"""
