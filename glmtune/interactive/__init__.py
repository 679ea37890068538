"""Talking to a model: in the terminal and on a web page, with a model in this process or behind a server.

``answerer.py`` is what both talk to, ``conversation.py`` what both remember of a talk: start with these two.
``remote.py`` answers by a server; ``terminal/`` is `glmtune chat`.
"""
