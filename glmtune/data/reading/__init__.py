"""Data files to conversations, each row with its line number for error messages.

In order: ``sources.py`` (which file a split means), ``readers.py`` (its rows; ``decoding.py`` and
``json_rows.py`` help), ``layouts.py`` and ``message_items.py`` (a row's columns to messages). Nothing is
tokenized here.
"""
