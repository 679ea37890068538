"""Many prompts at once, greedily: what they share read once, slots refilled as requests finish.

Begin with `engine`, which divides the work; `prompt_groups` and `prompt_cache` find and read shared prompts,
`next_token_scores` scores choices, and `continuous_batching` generates, on `slots` (keys and values),
`attention` and `model`. Nothing here knows text but `stop_text`; tokenizers stay with the callers.
"""
