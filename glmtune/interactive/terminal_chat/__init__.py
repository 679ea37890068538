"""`glmtune chat`: a conversation in the terminal, or with a pipe.

Start with ``loop.py``, which asks and answers by turns. ``session.py`` is what a user may change on the way,
``commands.py`` the words that change it, ``keyboard.py`` the line that is typed, ``display.py`` the answer as
it is shown, ``interrupt.py`` what Ctrl-C does meanwhile. ``piped.py`` takes the loop's place where no
terminal is.
"""
