"""What every client of a server needs, whoever asks: `glmtune eval backend=openai` and `glmtune chat url=`.

``server_address.py`` (start here) takes an address apart, keeps its key secret and finds the proxy;
``connection.py`` holds certificates and words what the system says of a broken connection; ``replies.py``
reads JSON of strangers within limits, and what a refusal says.
"""
