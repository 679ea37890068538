"""The HTTP server: OpenAI's interface, the original `POST /`, and what a service needs around them.

`recipes/serve.py` reads top to bottom what `glmtune serve` does. `app` puts the application together: routes
of `api`, and around them `service` (security, limits, health, metrics, log, the page). `run` is the process:
it listens at once, loads in the background, drains at the end. `keys` and `served_names` check what the user
set before anything is loaded. Only this package imports web libraries.
"""
