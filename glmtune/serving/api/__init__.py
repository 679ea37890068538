"""The routes of the server: OpenAI's chat, completions and models, and the original `POST /`.

Begin with `router`, which names the routes; each route stands in a module of its name. `state` is what they
share. A request goes through `fields` (what may be asked) and `running` (which hands it to the engine and
carries the events of its answers into the event loop) to `replies` (what OpenAI's clients read). `errors`
words what goes wrong. What surrounds the routes (keys, limits, health, metrics) is no matter of this package.
"""
