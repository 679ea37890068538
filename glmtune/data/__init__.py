"""From files of conversations to batches of ids.

``reading/`` turns files into conversations, ``dataset.py`` (start here) loads a split with it, ``encode.py``
makes ids and labels, ``collate.py`` batches; ``check.py`` looks at a data set before training. The prompt's
text comes from `glmtune.models.templates`.
"""
