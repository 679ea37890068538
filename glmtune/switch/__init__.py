"""The switch: a linear rule that decides for each request whether what was tuned applies.

Begin with ``rule.py``, what a file holds and a request is decided by; ``fit.py`` makes it from prompts.
Whoever decides (training, `model.generate`, the request engine) brings the hidden states.
"""
