"""Answers of a model: `engine` for evaluations, `predict` for data sets with references, perplexities.

Begin with `engine.engine` (requests that come and go, or many prompts known beforehand) or `predict.predict`
(a data set answered by it or with beams, each answer kept and scored). Conversations, which carry their cache
from turn to turn, live in `glmtune.models.chat`; benchmarks and what is done with answers to them live in
`evaluation`.
"""
