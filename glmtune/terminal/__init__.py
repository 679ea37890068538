"""The one way out to a terminal: text of files, models and servers is shown there, never obeyed.

A terminal takes orders inside the text it prints: escape sequences rename its window, write to the clipboard
or overwrite what stood there, and rich has a markup of its own. ``text.py`` (start here) makes such
characters visible and guards what libraries print; ``console.py`` holds rich's console and progress bars
with the same rule. Nothing else here writes to a terminal; files keep every character.
"""
