"""Who computes: a GLM in this process, a server with OpenAI's interface, or vLLM.

Each fulfils ``evaluation.backend.Backend``, which is all that the rest of the package knows of a model.
Start in ``glm.py``; ``prompt_encoder.py`` turns prompts into ids for it and for vLLM. A server builds its
prompts itself: ``openai_api.py`` asks it and ``openai_replies.py`` reads what it says, over ``http_json.py``
(attempts, redirects), ``http_replies.py`` (limits), ``server_address.py`` (keys) and ``event_loop.py``;
``endpoint.py`` holds its settings.
"""
