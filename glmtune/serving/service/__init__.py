"""What a service needs around its routes, each concern in one file and none knowing the routes.

A request passes, from outside: `connections` (limits of bytes and time on the socket), `request_log` (its id,
its line in the log, its place in the metrics), CORS, `guard` (Host, Origin, key), `gate` (loading or
draining, how many at once, the body, the time limit), and then the routes of `glmtune.serving.api` and those
of `routes` and `admin` here. `phases` says what the server is doing. Start with `glmtune.serving.app`, where
they are put together.
"""
