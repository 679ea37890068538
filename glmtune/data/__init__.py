"""From files of conversations to batches of ids.

``reading/`` turns files into conversations, ``dataset.py`` (start here) loads a split with it, ``encode.py``
makes ids and labels, ``lengths.py`` the limits that nobody gave, ``collate.py`` batches. ``truncation.py``
counts what is cut, ``as_trained.py`` keeps what shaped a run's prompts, and ``check.py`` looks at a data set
before training. The prompt's text comes from `glmtune.models.templates`.
"""
