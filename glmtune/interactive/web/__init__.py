"""The web page of `glmtune web`: chats with a model, and with what was tuned beside its base.

``serve.py`` builds and serves it: start there. ``page.py`` says what lies where, ``events.py`` what happens;
``answering.py`` reads answers while they are written, ``chats.py`` is what a browser keeps. ``guard.py`` lets
nothing through but what the page needs, ``safe_markdown.py`` makes a model's text safe to show.
"""
