"""`glmtune predict`: a data set's questions answered, scored against their references, kept row by row.

Begin with `predict`. A run passes `questions` (prompts and references), `run_identity` (may this run go on
with the rows there?), `generate` (the request engine, or for beams `beams`: transformers' search, with
`logits_processors`), `predictions` (the file) and `report`. `match` pairs two finished runs for `glmtune
score`.
"""
