"""The networks themselves: ChatGLM-6B as a transformers model, and the parts that all generations share.

Later generations are transformers' own GLM (`glmtune.models.glm`), so only what it lacks is here: a faster
attention on CPUs, the chunked loss, caches that grow in place, `torch.compile`. Weights, names and files are
not: see `glmtune.models.checkpoints`. Start with ``chatglm.py``; ``chatglm_inputs.py`` says what it derives
from ids.
"""
