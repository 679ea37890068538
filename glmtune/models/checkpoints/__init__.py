"""The official checkpoint format, in both directions: config.json, names and order of tensors, weight files.

Reading starts in ``reading.py``, writing in ``writing.py``; both work through the table of ``names.py``,
which follows from the configuration (``config.py``) and, for quantized checkpoints, from
``quantized_layout.py``. ``headers.py``, ``shards.py`` and ``shard_writer.py`` know files and bytes
alone; ``config_rules.py``, ``sizes.py`` and ``finite.py`` say what is refused before anything is built or
answered. Which release a folder holds is decided in ``models/releases``, the quantized formats' arithmetic is
`glmtune.quantization`.
"""
