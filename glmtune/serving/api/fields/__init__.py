"""What a request may hold: bodies read as JSON, and the fields of each route, obeyed or refused by name.

`body` reads and checks, `common` holds the fields of both of OpenAI's routes, `chat`, `completion` and
`original` those of each; `conversation` turns OpenAI's messages into the templates'; `extra` decides on all
other fields.
"""
