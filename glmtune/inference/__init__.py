"""Answers of a model: `engine` for evaluations, `predict` for data sets with references, perplexities.

Begin with `engine.engine` (many prompts that begin alike, greedy) or `predict.predict` (any decoding, each
answer kept and scored). Conversations, which carry their cache from turn to turn, live in
`glmtune.models.chat`; benchmarks and what is done with answers to them live in `evaluation`.
"""
