"""Tokens for many at once: requests that come and go while others run, and prompts of evaluations.

Begin with `engine`: its thread takes requests and steps, which means that it admits, reads and generates in
`batching`. From there downwards: `adapters` holds prefixes and LoRAs by name, `sampling` chooses tokens,
`states` holds the keys and values of rows of all lengths, `reading` is the attention of prompts, `model` the
model and `attention` what its layers call. `budget` says how much is done at once, `request_limits` what may
be asked. `many_prompts` is the way of evaluations: `prompt_groups` and `prompt_cache` find and read what
prompts share, `next_token_scores` scores choices, `switched` tells which prompts a switch leaves to the base.
Nothing here knows text but `stop_text`.
"""
