"""Who computes: a GLM in this process, a server with OpenAI's interface, or vLLM.

Each fulfils ``evaluation.backend.Backend``, which is all that the rest of the package knows of a model.
Start in ``glm.py``; ``prompt_encoder.py`` turns prompts into ids for it and for vLLM. A server builds its
prompts itself.
"""
