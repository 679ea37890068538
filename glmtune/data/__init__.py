"""From files of conversations to batches of ids.

``reading/`` turns files into conversations, ``conversations.py`` goes through those of a split,
``dataset.py`` (start here) loads one. ``encode.py`` makes ids and labels, ``encoded/`` has several processes
do so and keeps what they make, ``streaming/`` gives rows as they are learnt. ``lengths.py`` finds limits that
nobody gave, ``collate.py`` batches. ``truncation.py`` counts what is cut, ``as_trained.py`` keeps what shaped
a run's prompts, and ``check.py`` looks at a data set before training. The prompt's text comes from
`glmtune.models.templates`.
"""
