"""GLMs of every generation: found, read from their official checkpoints, run, written back, and talked to.

A load passes through the files in this order: ``releases/`` (which model is meant, where it lies) →
``checkpoints/`` (config.json and weight files) → ``architectures/`` (the networks) → ``official.py`` (both
put together: the classes users hold) → ``load.py``, where a reader starts. Text goes through ``templates/``
(messages → text), ``tokenizers/`` (text → ids) and ``chat/`` (``model.chat``).

Not here: prefixes (`glmtune.prefix`), the arithmetic of codes (`glmtune.quantization`), and the loaders of
the public interface, which need both (`glmtune.loading`).
"""
